"""``kvote env``: what to put into a bug report."""

import argparse
import json
from dataclasses import asdict

from kvote.cli.show import plain_console, plain_table
from kvote.env import Environment, environment


def run(args: argparse.Namespace) -> None:
    """Prints versions, machine and kernel backends."""
    found = environment()
    if args.json:
        print(json.dumps(asdict(found), indent=1))
        return
    console = plain_console()
    table = plain_table(show_header=False)
    for name, value in _facts(found):
        table.add_row(name, value)
    console.print(table)
    table = plain_table()
    for column in ("kernels", "what they compute", "state"):
        table.add_column(column, overflow="fold")
    for backend in found.backends:
        state = f"missing: {backend.missing}" if backend.missing else "in use" if backend.in_use else "switched off"
        table.add_row(backend.name, backend.computes, state)
    console.print(table)


def _facts(found: Environment) -> list[tuple[str, str]]:
    versions = [(name, version) for name, version in found.versions.items()]
    gib = 2**30
    memory = f"{found.memory_total / gib:.1f} GiB, {found.memory_available / gib:.1f} GiB available"
    return [
        *versions,
        ("platform", found.platform),
        ("CPU", found.cpu),
        ("SIMD", " ".join(found.simd) or "unknown"),
        ("threads", str(found.threads)),
        ("memory", memory),
    ]
