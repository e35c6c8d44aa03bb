"""``kvote methods``: what there is, where it comes from, what it needs."""

import argparse
import json

import kvote.methods  # noqa: F401  (each method registers itself)
from kvote.cli.show import plain_console, plain_table
from kvote.method import METHODS

_FIELDS = ("name", "rooms", "summary", "source", "needs")


def run(args: argparse.Namespace) -> None:
    """Prints every registered method by name."""
    rows = [{field: str(getattr(METHODS[name], field)) for field in _FIELDS} for name in sorted(METHODS)]
    if args.json:
        print(json.dumps({"methods": rows}, indent=1))
        return
    table = plain_table()
    for column in ("method", "decides", "what it does, where it comes from, what it needs"):
        table.add_column(column, no_wrap=column == "method", overflow="fold")
    for row in rows:
        table.add_row(row["name"], row["rooms"], f"{row['summary']}\n{row['source']}; needs {row['needs']}")
    plain_console().print(table)
