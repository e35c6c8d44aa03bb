"""The figures that ship with kvote: what every method was measured to do. Written by bench/figures.py."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import kvote.methods

_FILE = Path(kvote.methods.__file__).with_name("figures.json")
_VERDICTS = {"equals": "no better than random", "loses": "worse than random"}


@dataclass(frozen=True)
class Figures:
    """By name of a method, or of methods that are joined: rows of ``accuracy``, and of decode ``steps``."""

    held: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """In the order of the files, each once."""
        rows = [row for part in self.held.values() for row in part["rows"]]
        return list(dict.fromkeys(row["name"] for row in rows))

    def accuracy(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self._rows("accuracy") if row["name"] == name]

    def steps(self, name: str) -> list[dict[str, Any]]:
        return [row for row in self._rows("steps") if row["name"] == name]

    def _rows(self, part: str) -> list[dict[str, Any]]:
        return list(self.held.get(part, {}).get("rows", []))

    def told(self, name: str) -> list[str]:
        """One line of accuracy and one of time, as far as there are any."""
        lines = []
        if answers := "; ".join(_answered(row) for row in self.accuracy(name)):
            lines.append(f"right answers at {self.held['accuracy']['tokens']:,} tokens: {answers}")
        if steps := "; ".join(_stepped(row) for row in self.steps(name)):
            lines.append(f"decode step of a layer: {steps}")
        return lines

    @property
    def origin(self) -> list[str]:
        """The command that measured each part of the figures, and its machine."""
        return [f"{part['command']} on {_machine(part['machine'])}" for part in self.held.values()]


@cache
def figures() -> Figures:
    """The figures of this version; none where the file is missing."""
    return Figures(json.loads(_FILE.read_text()) if _FILE.exists() else {})


def percent(share: float) -> str:
    """Without decimals."""
    return f"{100 * share:.0f}%"


def _answered(row: dict[str, Any]) -> str:
    beside = [f"{percent(row['bytes'])} of the bytes"]
    if row["read"] < 0.99 and row["bytes"] > 0.99:
        beside = [f"{percent(row['read'])} of the tokens read"]
    if row["random"] is not None:
        beside.append(f"random {percent(row['random'])}")
    if row["verdict"] in _VERDICTS:
        beside.append(_VERDICTS[row["verdict"]])
    return f"{percent(row['accuracy'])} ({', '.join(beside)})"


def _stepped(row: dict[str, Any]) -> str:
    return (
        f"{row['tokens']:,} tokens {row['ms']:.1f} ms, {row['to_packed']:.1f}x sdpa packed, "
        f"{row['to_as_it_comes']:.0f}x sdpa as transformers calls it, {row['to_dense']:.1f}x dense, "
        f"{percent(row['bytes'])} of the bytes"
    )


def _machine(machine: dict[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
