"""``kvote methods``: what there is, where it comes from, what it needs."""

import argparse
import json

from rich.console import Console
from rich.table import Table

import kvote.methods  # noqa: F401  (fills the registry)
from kvote.cli.show import plain_table
from kvote.method import METHODS

_FIELDS = ("name", "rooms", "summary", "source", "needs")


def run(args: argparse.Namespace) -> None:
    """Prints every registered method by name."""
    rows = [{field: str(getattr(METHODS[name], field)) for field in _FIELDS} for name in sorted(METHODS)]
    if args.json:
        print(json.dumps({"methods": rows}, indent=1))
        return
    table: Table = plain_table()
    for field in _FIELDS:
        table.add_column(field, no_wrap=field in ("name", "rooms"), overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    Console().print(table)
