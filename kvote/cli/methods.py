"""``kvote methods``: what there is, where it comes from, what it needs, and what it was measured to do."""

import argparse
import json

import kvote.methods  # noqa: F401  (each method registers itself)
from kvote.cli.figures import figures
from kvote.cli.page import page
from kvote.cli.show import plain_console, plain_table
from kvote.method import METHODS

_FIELDS = ("name", "rooms", "summary", "source", "needs")


def run(args: argparse.Namespace) -> None:
    """Prints every registered method by name, and what was measured of methods that are joined."""
    if args.table:
        print(page(), end="")
        return
    found = figures()
    rows = [{field: str(getattr(METHODS[name], field)) for field in _FIELDS} for name in sorted(METHODS)]
    joined = [name for name in found.names if name not in METHODS]
    if args.json:
        measured = [{**row, **_measured(row["name"])} for row in rows]
        others = [{"name": name, **_measured(name)} for name in joined]
        print(json.dumps({"methods": measured, "variants": others, "measured": found.origin}, indent=1))
        return
    table = plain_table()
    for column in ("method", "decides", "what it does, where it comes from, what it needs, what was measured"):
        table.add_column(column, no_wrap=column == "method", overflow="fold")
    for row in rows:
        about = f"{row['summary']}\n{row['source']}; needs {row['needs']}"
        table.add_row(row["name"], row["rooms"], "\n".join([about, *found.told(row["name"])]))
    console = plain_console()
    console.print(table)
    for name in joined:
        console.print("\n".join([name, *(f"  {line}" for line in found.told(name))]), soft_wrap=True)
    for line in found.origin:
        console.print(f"Measured with {line}", soft_wrap=True)


def _measured(name: str) -> dict[str, object]:
    return {"accuracy": figures().accuracy(name), "steps": figures().steps(name)}
