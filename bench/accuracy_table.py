"""The table and the picture of bench/accuracy.py, from its points."""

from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from baselines import LEVEL, Verdict, verdict
from common import table

TASKS = ("needle", "several", "pass key")
COLUMNS = (0.5, 0.25, 0.125, 0.0625)
_WORDS = {"beats": "better than random", "equals": "not better than random", "loses": "worse than random"}
_WAYS = {
    "prompt": "the question ends the prompt",
    "steps": "the question is fed token by token",
    "later": "asked after the prompt was read and cut down",
}


@dataclass(frozen=True)
class Row:
    """A method at one budget: answers to all tasks one after the other, and those of chance; shares of dense's bytes
    and of the tokens of a prompt."""

    name: str
    share: float
    way: str
    spec: str
    kind: str
    answers: dict[str, str]
    chance: str | None
    bytes: float
    read: float

    @property
    def right(self) -> str:
        return "".join(self.answers.values())

    @property
    def accuracy(self) -> float:
        return self.right.count("1") / len(self.right)

    @property
    def random(self) -> float | None:
        return None if self.chance is None else self.chance.count("1") / len(self.chance)

    @property
    def verdict(self) -> Verdict | None:
        return None if self.chance is None else verdict(self.right, self.chance)[0]


def rows_of(rows: list[dict[str, Any]], points: list[dict[str, Any]]) -> list[Row]:
    """Rows of which every task, and chance, was answered with equally many questions."""
    made = []
    for row in rows:
        mine = _answers(points, row["spec"], row["way"])
        other = _answers(points, row["chance"], row["way"]) if row["chance"] else None
        dense = [p for p in points if p["spec"] == "dense" and p["way"] == row["way"]]
        held = [p for p in points if p["spec"] == row["spec"] and p["way"] == row["way"]]
        if len(mine) < len(TASKS) or not dense:
            continue
        chance = "".join(other.values()) if other else None
        if chance is not None and len(chance) != sum(map(len, mine.values())):
            continue
        whole = sum(p["bytes"] for p in dense) / len(dense)
        made.append(
            Row(
                row["name"],
                row["share"],
                row["way"],
                row["spec"],
                row["kind"],
                mine,
                chance,
                sum(p["bytes"] for p in held) / len(held) / whole,
                sum(p["read"] for p in held) / len(held) / (sum(p["read"] for p in dense) / len(dense)),
            )
        )
    return made


def _answers(points: list[dict[str, Any]], spec: str, way: str) -> dict[str, str]:
    found = {p["task"]: p["right"] for p in points if p["spec"] == spec and p["way"] == way}
    return {task: found[task] for task in TASKS if task in found}


def render(rows: list[dict[str, Any]], points: list[dict[str, Any]]) -> str:
    """Markdown: all methods by budget, what follows from it, and every row in full."""
    made = rows_of(rows, points)
    if not made:
        return "Nothing has been measured."
    parts = []
    for way in ("prompt", "later"):
        chosen = [row for row in made if row.way == way or (way == "prompt" and row.way == "steps")]
        if any(row.name != "dense" for row in chosen):
            parts += [f"Where {_WAYS[way]}:", _overview(chosen), *_said(chosen)]
    asked = "; ".join(f"{way}: {told}" for way, told in _WAYS.items())
    return "\n\n".join([*parts, f"In full (asked: {asked}):", _full(made)])


def _overview(rows: list[Row]) -> str:
    """Right answers to all tasks, bytes held, and chance beside them."""
    lines = []
    for name in dict.fromkeys(row.name for row in rows if row.name != "dense"):
        mine = {row.share: row for row in rows if row.name == name}
        lines.append([_plain(name), *(_cell(mine.get(share)) for share in COLUMNS)])
    dense = next(row for row in rows if row.name == "dense")
    head = f"right answers (bytes held; random beside it); dense: {100 * dense.accuracy:.0f}%"
    return table([head, *(f"{100 * share:g}%" for share in COLUMNS)], lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    mine = f"{100 * row.accuracy:.0f}%"
    mine = f"**{mine}**" if row.verdict == "beats" else mine
    beside = [f"{100 * row.bytes:.0f}%"] if row.kind == "keep" else [f"reads {100 * row.read:.0f}%"]
    beside += [] if row.random is None else [f"random {100 * row.random:.0f}%"]
    return f"{mine} ({'; '.join(beside)})"


def _plain(name: str) -> str:
    return name.replace("|", "\\|")


def _said(rows: list[Row]) -> list[str]:
    """Who is no better than chance, and where: from the numbers alone."""
    judged = [row for row in rows if row.verdict is not None]
    if not judged:
        return []
    asked = len(judged[0].right)
    error = 100 * sqrt(0.25 / asked)
    lines = [
        f"Bold: better than random with the same bytes (methods that hold everything: with as many tokens read), by an "
        f"exact sign test over {asked} questions, p < {LEVEL:g}. The standard error of a figure is at most {error:.1f} "
        "points. Bytes are all that layers hold, unused parts of pages with it; tables of rotary angles, which do not "
        "grow with the text, are left out."
    ]
    for kind in ("loses", "equals"):
        weak: dict[str, list[str]] = {}
        for row in judged:
            if row.verdict == kind:
                weak.setdefault(row.name, []).append(f"{100 * row.share:g}%")
        if weak:
            told = "; ".join(f"{_plain(name)} at {', '.join(shares)}" for name, shares in weak.items())
            lines.append(f"{_WORDS[kind].capitalize()}: {told}.")
    if all(row.verdict == "beats" for row in judged):
        lines.append("Every method is better than random at every budget.")
    return lines


def _full(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        shares = [f"{100 * row.answers[task].count('1') / len(row.answers[task]):.0f}%" for task in TASKS]
        chance = [] if row.random is None else [f"{100 * row.random:.0f}%", _WORDS[row.verdict or "equals"]]
        numbers = [f"{100 * row.bytes:.1f}%", f"{100 * row.read:.1f}%", *shares, f"{100 * row.accuracy:.0f}%"]
        lines.append([f"`{_plain(row.spec)}`", *numbers, *(chance or ["", ""]), row.way])
    head = ["spec", "bytes held", "tokens read", *TASKS, "all", "random", "that is", "asked"]
    return table(head, lines)


def picture(rows: list[dict[str, Any]], points: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against bytes held (what drops or encodes), and against tokens read (what holds everything)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = [row for row in rows_of(rows, points) if row.way in ("prompt", "steps")]
    figure, both = plt.subplots(1, 2, figsize=(12, 5.6), dpi=140, sharey=True, width_ratios=[3, 2])
    panels = (("keep", "randomkeep", "bytes held, % of dense"), ("read", "random", "tokens read, % of dense"))
    colours = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for axes, (kind, baseline, label) in zip(both, panels, strict=True):
        names = [n for n in dict.fromkeys(r.name for r in made if r.kind == kind) if n not in ("dense", baseline)]
        for i, name in enumerate([*names, baseline]):
            mine = sorted((row for row in made if row.name == name), key=lambda row: row.share)
            x = [100 * (row.bytes if kind == "keep" else row.read) for row in mine]
            y = [100 * row.accuracy for row in mine]
            chance = name == baseline
            style = {"color": "black", "linestyle": "--", "marker": "x", "linewidth": 2.2} if chance else {}
            look = {"color": colours[i % 20], "marker": "osD^vP*X<>"[i % 10], "linewidth": 1.4, **style}
            axes.plot(x, y, label=f"{name} (chance)" if chance else name, markersize=6, **look)
        axes.set_xscale("log", base=2)
        ticks = (3, 6, 12, 25, 50, 100)
        axes.set_xticks(ticks, [f"{tick}%" for tick in ticks])
        axes.set(xlabel=label, xlim=(3, 125), ylim=(-3, 104))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3 if names else 1)
    both[0].set_ylabel("right answers, %")
    both[0].set_title("methods that hold less", fontsize=11)
    both[1].set_title("methods that read less", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
