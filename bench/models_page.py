"""docs/models.md, made from the records of bench/models.py."""

import re
from collections import Counter
from typing import Any

import transformers
from common import table
from zoo.answers import ROUNDING
from zoo.trial import verdict

_METHODS = ("dense", "tokenselect")
_TITLES = {"dense": "dense", "tokenselect": "TokenSelect", "streamingllm": "StreamingLLM"}

_HEAD = """# Models

Every class of transformers' causal-LM mapping and of its image-text-to-text mapping, as of transformers {version},
built from its config with random weights and small sizes, one layer of each kind that its default config has (at least
one of full attention where the config allows it), and tried by `python bench/models.py`, which writes this page.

- **Identical**: one prompt, a batch with left and one with right padding, beams, prompt lookup and chunked prefill, as
  far as the class does these with its own cache, give the same greedy tokens as with the default cache, and logits
  that differ by at most {rounding:g} of the largest one. TokenSelect reads everything here. StreamingLLM does not: a
  model of one layer answers as the model without kvote does on nothing but sinks and window, after a prompt and after
  each decode step.
- **Refused**: `kvote.Cache(model, method)` or the first pass says why, in the sentence that is cited below. Where only
  a situation is refused, it is named.
- **Wrong** and **crashed** are faults: another answer, or an exception that is not kvote's own.
- The default cache is tried before and after: with kvote's attention in the model, other caches must answer bit by bit
  as before.
"""


def page(records: list[dict[str, Any]], causal: set[str]) -> str:
    """The whole page."""
    generating = [each for each in records if each.get("generates")]
    reasons = _reasons(generating)
    parts = [_HEAD.format(version=transformers.__version__, rounding=ROUNDING), _counts(records, causal)]
    parts.append(_reason_list(reasons, generating))
    faults = _faults(records)
    if faults:
        parts.append("## Faults\n\n" + "\n".join(faults) + "\n")
    for title, part in (
        ("Causal language models", [each for each in generating if each["class"] in causal]),
        ("Image and text to text", [each for each in generating if each["class"] not in causal]),
    ):
        rows = [_row(each, reasons) for each in part]
        parts.append(f"## {title}\n\n" + table(["class", *(_TITLES.values()), "default cache afterwards"], rows) + "\n")
    parts.append(_apart(records))
    return "\n".join(parts)


def _counts(records: list[dict[str, Any]], causal: set[str]) -> str:
    rows = []
    for title, part in (
        ("causal LM", [each for each in records if each["class"] in causal]),
        ("image-text-to-text only", [each for each in records if each["class"] not in causal]),
    ):
        generating = [each for each in part if each.get("generates")]
        for method in _TITLES:
            words = Counter(verdict(_found(each, method)) for each in generating)
            numbers = [words[word] for word in ("identical", "partly", "refused", "wrong", "crashed", "not tried")]
            rows.append([f"{title}, {_TITLES[method]}", str(len(part)), str(len(generating)), *map(str, numbers)])
    header = ["", "classes", "tried", "identical", "in part", "refused", "wrong", "crashed", "not to be tried"]
    after = sum(each["after"]["outcome"] != "identical" for each in records if each.get("generates"))
    return table(header, rows) + f"\n\nClasses whose default cache answers otherwise afterwards: {after}.\n"


def _found(record: dict[str, Any], method: str) -> dict[str, dict[str, str]]:
    return record["streamingllm"] if method == "streamingllm" else record["methods"][method]


def _anonymous(record: dict[str, Any], sentence: str) -> str:
    """A refusal without the names that make every one of them different."""
    sentence = re.sub(r"layer \d+", "a layer", re.sub(r" \(layer \d+\)", "", sentence))
    stem = re.sub(r"(For\w+|LMHeadModel|Model)$", "", record["class"])
    sentence = re.sub(rf"\b{re.escape(record['class'])}\b", "The model", sentence)
    sentence = re.sub(r"\b[A-Z]\w*(Attention\w*|SelfAttention|ForCausalLM|Model)\b", "The model", sentence)
    return re.sub(rf"\b{re.escape(stem)}\b", "The model", sentence)


def _said(records: list[dict[str, Any]]) -> Counter[str]:
    """Reason -> in how many classes it is given."""
    return Counter(
        sentence
        for record in records
        for sentence in {
            _anonymous(record, each["said"])
            for method in _TITLES
            for each in _found(record, method).values()
            if each["outcome"] == "refused"
        }
    )


def _reasons(records: list[dict[str, Any]]) -> dict[str, int]:
    """Reason -> its number, the most frequent first."""
    return {sentence: number for number, (sentence, _) in enumerate(_said(records).most_common(), 1)}


def _reason_list(reasons: dict[str, int], records: list[dict[str, Any]]) -> str:
    said = _said(records)
    lines = [f"{number}. {sentence} ({said[sentence]})" for sentence, number in reasons.items()]
    head = "## Why classes are refused\n\nTables name these by number; in brackets, how many classes are told so.\n\n"
    return head + "\n".join(lines) + "\n"


def _cell(record: dict[str, Any], method: str, reasons: dict[str, int]) -> str:
    found = _found(record, method)
    word = verdict(found)
    if word in ("refused", "partly"):
        numbers: dict[int, list[str]] = {}
        for situation, each in found.items():
            if each["outcome"] == "refused":
                numbers.setdefault(reasons[_anonymous(record, each["said"])], []).append(situation)
        if word == "refused":
            return "refused: " + ", ".join(str(number) for number in sorted(numbers))
        inner = "; ".join(f"{', '.join(where)} refused: {number}" for number, where in numbers.items())
        return f"identical; {inner}"
    if word == "identical" and any(each["outcome"] == "undecided" for each in found.values()):
        return "identical but for a near-tie" if method != "streamingllm" else "undecided"
    return word if word in ("identical", "not tried") else f"**{word}**"


def _row(record: dict[str, Any], reasons: dict[str, int]) -> list[str]:
    after = record["after"]["outcome"]
    after = "as before" if after == "identical" else f"**{after}**"
    return [f"`{record['class']}`", *(_cell(record, method, reasons) for method in _TITLES), after]


def _faults(records: list[dict[str, Any]]) -> list[str]:
    lines = []
    for record in records:
        name = record["class"]
        if "died" in record:
            lines.append(f"- `{name}`: {record['died'].splitlines()[-1][:200]}")
        if not record.get("generates"):
            continue
        for method in _TITLES:
            grouped: dict[str, list[str]] = {}
            for situation, each in _found(record, method).items():
                if each["outcome"] in ("wrong", "crashed"):
                    grouped.setdefault(f"{each['outcome']}: {each['said'][:160]}", []).append(situation)
            lines += [f"- `{name}`, {_TITLES[method]}, {', '.join(at)}: {what}" for what, at in grouped.items()]
        if record["after"]["outcome"] != "identical":
            lines.append(
                f"- `{name}`, default cache afterwards: {record['after']['outcome']}: {record['after']['said'][:160]}"
            )
    return lines


def _apart(records: list[dict[str, Any]]) -> str:
    """What is listed and not counted."""
    parts = ["## Not counted", "", "Not built here:", ""]
    parts += [f"- `{each['class']}`: {each['reason']}" for each in records if not each["built"]]
    parts += ["", "Built, but without kvote they do not generate from text alone:", ""]
    parts += [
        f"- `{each['class']}`: {each['reason']}" for each in records if each["built"] and each.get("generates") is False
    ]
    unsupported: dict[str, list[str]] = {}
    for each in records:
        for situation in each.get("unsupported", {}):
            unsupported.setdefault(situation, []).append(each["class"])
    parts += ["", "Situations that a class does not do with its own cache either:", ""]
    parts += [f"- {situation}: {', '.join(f'`{name}`' for name in names)}" for situation, names in unsupported.items()]
    untried = [
        f"- `{each['class']}`: {next(iter(each['streamingllm'].values()))['said'][:200]}"
        for each in records
        if each.get("generates") and verdict(each["streamingllm"]) == "not tried"
    ]
    parts += [
        "",
        "StreamingLLM against its definition was not to be tried, for want of a model of one layer:",
        "",
        *untried,
    ]
    return "\n".join(parts) + "\n"
