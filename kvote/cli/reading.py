"""A document read for a command, with a bar for its tokens."""

import argparse
from typing import Any

from kvote import Document
from kvote.cli.load import Loaded
from kvote.cli.plain import plain
from kvote.cli.progress import progress


def read_document(
    loaded: Loaded, text: str, name: str, spec: str, args: argparse.Namespace, *, tokens: int, **more: Any
) -> Document:
    """``text`` of so many ``tokens``, read with ``spec``, which the bar calls ``name``; ``more``: of ``Document``."""
    with progress() as bar:
        task = bar.add_task(plain(name), total=tokens)
        return Document(
            loaded.model,
            loaded.tokenizer,
            text,
            spec,
            system=args.system,
            raw=args.raw,
            progress=lambda count: bar.advance(task, count),
            **more,
        )
