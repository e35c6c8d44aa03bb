"""``kvote info``: what is in a file that kvote has saved, and whether it is whole. No model is needed."""

import argparse
from typing import Any

from kvote.cli.plain import as_json, plain
from kvote.cli.show import plain_console
from kvote.saving.block_file import VERSION, BlockFile
from kvote.saving.caches import told

_INDENT = 12


def run(args: argparse.Namespace) -> None:
    """Reads every byte of ``args.file`` and prints what it holds."""
    with BlockFile(args.file) as file:
        facts = told(file)
        file.check()
        found = {"file": args.file, "version": VERSION, **facts, "file_bytes": file.size, "whole": True}
    if args.json:
        print(as_json(found))
        return
    console = plain_console()
    for name, value in _lines(found):
        console.print(f"{name:{_INDENT}}{plain(value)}", soft_wrap=True)


def _lines(found: dict[str, Any]) -> list[tuple[str, str]]:
    size = f"{found['file_bytes'] / 2**20:,.1f} MiB, {found['nbytes'] / 2**20:,.1f} MiB in memory"
    return [
        ("File", f"{found['file']}, version {found['version']}, every byte as it was written"),
        ("Holds", f"a {found['kind']} of {found['tokens']:,} tokens"),
        ("Method", found["method"]),
        ("Model", f"{found['model']} ({found['model_type']}), {found['layers']} layers, in {found['dtype']}"),
        ("Size", size),
    ]
