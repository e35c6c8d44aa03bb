"""Puts the figures that ``kvote methods`` shows into the package: kvote/methods/figures.json, from bench/results/.

Measures nothing: run bench/accuracy.py and bench/methods.py before.

    python bench/figures.py
"""

import json
from pathlib import Path
from typing import Any

from accuracy_table import rows_of
from common import RESULTS

TARGET = Path(__file__).parents[1] / "kvote" / "methods" / "figures.json"
_STEP = ("name", "spec", "tokens", "ms", "shortest_ms", "longest_ms", "to_packed", "to_as_it_comes", "to_dense")
_FROM = ("command", "machine")


def accuracy(held: dict[str, Any]) -> dict[str, Any]:
    """Right answers where the question ends the prompt, or is fed token by token."""
    rows = [
        {
            "name": row.name,
            "spec": row.spec,
            "share": row.share,
            "questions": len(row.right),
            "accuracy": round(row.accuracy, 4),
            "bytes": round(row.bytes, 4),
            "read": round(row.read, 4),
            "random": None if row.random is None else round(row.random, 4),
            "verdict": row.verdict,
        }
        for row in rows_of(held["rows"], held["points"])
        if row.way != "later"
    ]
    return {**{key: held[key] for key in _FROM}, "tokens": held["tokens"], "rows": rows}


def steps(held: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a decode step."""
    rows = [
        {key: round(p[key], 4) if isinstance(p[key], float) else p[key] for key in _STEP}
        | {"bytes": round(p["bytes_to_dense"], 4)}
        for p in held["points"]
    ]
    return {**{key: held[key] for key in _FROM}, "rows": rows}


def main() -> None:
    made = {}
    for name, file, take in (("accuracy", "accuracy", accuracy), ("steps", "methods", steps)):
        path = RESULTS / f"{file}.json"
        if not path.exists():
            raise SystemExit(f"{path} is missing; run bench/{file}.py first.")
        made[name] = take(json.loads(path.read_text()))
    TARGET.write_text(json.dumps(made, indent=1) + "\n")
    for name, part in made.items():
        print(f"{TARGET.name}: {len(part['rows'])} rows of {name}")


if __name__ == "__main__":
    main()
