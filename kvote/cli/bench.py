"""``kvote bench``: the table of kernels on the user's machine."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

import torch

from kvote.cli.show import plain_console, plain_table
from kvote.env import environment
from kvote.kernels import instruction_set
from kvote.measure.geometry import Geometry
from kvote.measure.kernels import Row, Table, default_tokens, measure, refuse
from kvote.measure.sweep import Sweep


def run(args: argparse.Namespace) -> None:
    """Measures every length asked for, and prints a table of each."""
    geometry = Geometry(args.heads, args.kv_heads, args.head_dim)
    lengths = args.tokens or [default_tokens(geometry)]
    for tokens in lengths:
        refuse(geometry, tokens)
    with torch.no_grad():
        sweep = Sweep()
        tables = [measure(geometry, tokens, sweep, say=_say) for tokens in lengths]
    machine = _machine()
    if args.json:
        shape = {"heads": geometry.heads, "kv_heads": geometry.kv_heads, "head_dim": geometry.dim, "dtype": "bfloat16"}
        print(
            json.dumps({"machine": machine, "geometry": shape, "tables": [asdict(table) for table in tables]}, indent=1)
        )
        return
    console = plain_console()
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']} kernels\n"
        f"One layer with {geometry.heads} query heads, {geometry.kv_heads} key heads of {geometry.dim} channels, "
        "bfloat16; a new token each call, caches cold",
        soft_wrap=True,
    )
    for table in tables:
        _show(table, console)


def _say(what: str) -> None:
    print(f"kvote: {what}", file=sys.stderr, flush=True)


def _machine() -> dict[str, Any]:
    found = environment()
    return {
        "cpu": found.cpu,
        "threads": found.threads,
        "instruction_set": instruction_set(),
        "versions": found.versions,
    }


def _show(table: Table, console: Any) -> None:
    console.print(
        f"\n{table.tokens:,} tokens; memory is read at {table.bandwidth:.1f} GB/s "
        f"({table.lowest_bandwidth:.1f} to {table.highest_bandwidth:.1f})",
        soft_wrap=True,
    )
    shown = plain_table()
    shown.add_column("kernel", overflow="fold")
    for name in ("ms", "shortest to\nlongest", "ratio to\nsdpa, packed", "GB/s", "of the\nbandwidth"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in table.rows:
        shown.add_row(row.kernel, *_figures(row))
    console.print(shown)


def _figures(row: Row) -> list[str]:
    return [
        _three_digits(row.ms),
        "called once" if row.called_once else f"{_three_digits(row.shortest_ms)} to {_three_digits(row.longest_ms)}",
        f"{row.ratio:,.{_decimals(row.ratio)}f}x",
        "-" if row.gb_per_s is None else f"{row.gb_per_s:.1f}",
        "-" if row.share is None else f"{row.share:.0%}",
    ]


def _three_digits(ms: float) -> str:
    return f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def _decimals(ratio: float) -> int:
    return 0 if ratio >= 20 else 1 if ratio >= 0.1 else 2
