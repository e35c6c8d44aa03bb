"""``kvote read``: read a document once and keep what was read in a file."""

import argparse
import os
from dataclasses import asdict, dataclass

from kvote.cli.load import load, quiet
from kvote.cli.plain import as_json
from kvote.cli.reading import read_document
from kvote.cli.room import check_memory
from kvote.cli.show import plain_console
from kvote.cli.subject import name_of, read_text
from kvote.errors import InputError
from kvote.files import check_writable
from kvote.spec import parse


@dataclass(frozen=True)
class Written:
    """A document that was read and saved, and the size of its file."""

    model: str
    document: str
    method: str
    tokens: int
    prefill_seconds: float
    file: str
    file_bytes: int


def run(args: argparse.Namespace) -> None:
    """Reads ``args.document`` and writes ``args.out``."""
    check_writable(args.out)
    text = read_text(args.document)
    if not text.strip():
        raise InputError(f"{name_of(args.document)} is empty; give a text to read.")
    parse(args.method)
    loaded = load(args.model, dtype=args.dtype, device=args.device, load_in=args.load_in)
    spec = loaded.spec(args.method)
    tokens = len(loaded.ids(text))
    check_memory(loaded.model, parse(spec), tokens)
    with quiet(bars=False):
        document = read_document(loaded, text, args.method, spec, args, tokens=tokens)
    document.save(args.out)
    found = Written(
        model=loaded.name,
        document=name_of(args.document),
        method=spec,
        tokens=tokens,
        prefill_seconds=round(document.prefill_seconds, 4),
        file=args.out,
        file_bytes=os.path.getsize(args.out),
    )
    if args.json:
        print(as_json(asdict(found)))
        return
    plain_console().print(
        f"{found.document}: {tokens:,} tokens read in {found.prefill_seconds:.1f} s with {spec}; {found.file} takes "
        f"{found.file_bytes / 2**20:,.1f} MiB",
        soft_wrap=True,
    )
