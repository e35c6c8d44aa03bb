"""docs/methods.md, made from the registry, from trying every pair, and from the figures that ship with kvote."""

from typing import Any

from kvote.cli.figures import figures, percent
from kvote.method import METHODS
from kvote.pairs import Pair, pairs

_HEAD = """# Methods

Made by `kvote methods --table > docs/methods.md`; a test compares the two. What a parameter means is said by
`kvote methods NAME`.
"""
_JOINING = """## What composes with what

Every pair was built (`a | b`; the order does not matter). **yes**: with the defaults. A letter: with parameters that
are not the defaults. A number: refused when the method is built, for the reason below.
"""
_ACCURACY = """## Accuracy and bytes

Right answers of the embedded model (bytes held in the cache, or tokens read where a method holds everything; random
tokens in the same bytes, or in the same number). Bold: better than random.
"""
_STEPS = """## Time of a decode step

One layer in the geometry of Llama-3.1-8B, bfloat16. Times faster than sdpa with query heads packed as rows, than sdpa
as transformers calls it, and than kvote dense.
"""


def page() -> str:
    """Markdown."""
    names = sorted(METHODS)
    found = {frozenset((pair.left, pair.right)): pair for pair in pairs()}
    letters, numbers = _legend(list(found.values()))
    rows = [
        [f"**{a}**", *("" if a == b else _cell(found[frozenset((a, b))], letters, numbers) for b in names)]
        for a in names
    ]
    parts = [_HEAD, _listed(names), _JOINING, _table(["", *names], rows)]
    legend = [f"- {letter}: `{', '.join(given)}`" for given, letter in letters.items()]
    legend += [f"- {number}: {reason}." for reason, number in numbers.items()]
    parts += ["\n".join(legend), *_measured()]
    return "\n".join(part if part.endswith("\n") else f"{part}\n" for part in parts)


def _listed(names: list[str]) -> str:
    rows = [
        [f"`{name}`", METHODS[name].rooms, METHODS[name].summary, METHODS[name].needs, METHODS[name].source]
        for name in names
    ]
    return _table(["method", "decides", "what it does", "needs", "source"], rows)


def _legend(found: list[Pair]) -> tuple[dict[tuple[str, ...], str], dict[str, int]]:
    """Letters for parameters and numbers for reasons, in the order in which they come."""
    given = dict.fromkeys(pair.given for pair in found if pair.reason is None and pair.given)
    reasons = dict.fromkeys(pair.reason for pair in found if pair.reason is not None)
    return {each: chr(ord("a") + i) for i, each in enumerate(given)}, {each: i + 1 for i, each in enumerate(reasons)}


def _cell(pair: Pair, letters: dict[tuple[str, ...], str], numbers: dict[str, int]) -> str:
    if pair.reason is not None:
        return str(numbers[pair.reason])
    return letters[pair.given] if pair.given else "yes"


def _measured() -> list[str]:
    held = figures().held
    parts = []
    if "accuracy" in held:
        shares = sorted({row["share"] for row in held["accuracy"]["rows"] if row["share"] < 1}, reverse=True)
        rows = [
            [_escaped(name), *(_answers(figures().accuracy(name), share) for share in shares)]
            for name in figures().names
            if any(row["share"] < 1 for row in figures().accuracy(name))
        ]
        parts += [_ACCURACY, _table(["budget", *(f"{100 * share:g}%" for share in shares)], rows)]
    if "steps" in held:
        rows = [[f"`{_escaped(row['spec'])}`", *_times(row)] for row in held["steps"]["rows"]]
        head = ["method", "tokens", "ms", "sdpa packed", "sdpa as called", "kvote dense", "bytes held"]
        parts += [_STEPS, _table(head, rows)]
    if figures().origin:
        parts.append("Measured with " + "; ".join(f"`{line}`" for line in figures().origin) + ".")
    return parts


def _answers(rows: list[dict[str, Any]], share: float) -> str:
    for row in rows:
        if row["share"] == share:
            right = percent(row["accuracy"])
            right = f"**{right}**" if row["verdict"] == "beats" else right
            reads = row["bytes"] > 0.99
            beside = [f"reads {percent(row['read'])}" if reads else percent(row["bytes"])]
            beside += [] if row["random"] is None else [f"random {percent(row['random'])}"]
            return f"{right} ({'; '.join(beside)})"
    return ""


def _times(row: dict[str, Any]) -> list[str]:
    ratios = [f"{row['to_packed']:.1f}x", f"{row['to_as_it_comes']:.0f}x", f"{row['to_dense']:.2f}x"]
    return [f"{row['tokens']:,}", f"{row['ms']:.2f}", *ratios, percent(row["bytes"])]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
