"""Documents that an earlier ``kvote read`` or ``ask --save`` has kept in a file."""

import argparse
import warnings

from kvote import Document
from kvote.cli.arguments import METHOD
from kvote.cli.load import Loaded
from kvote.cli.plain import warn
from kvote.cli.subject import Subject
from kvote.saving.block_file import BlockFile
from kvote.saving.caches import told
from kvote.saving.documents import method_of


def kept(loaded: Loaded, asked: Subject, spec: str, args: argparse.Namespace) -> Document:
    """The document in ``args.load``; where that cannot be used and its text is at hand, it is read again.

    Raises InputError as ``Document.load``, and for a method that is named and not the file's.
    """
    # The default gives way to the method in the file, unless that cannot be told and the text is read again.
    gives_way = args.method == METHOD and (not asked.text or method_of(args.load) is not None)
    method = None if gives_way else spec
    reading = {"system": args.system, "raw": args.raw}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        document = Document.load(
            args.load, loaded.model, loaded.tokenizer, text=asked.text or None, method=method, **reading
        )
    for warning in said:
        warn(str(warning.message))
    return document


def tokens_in(path: str) -> int:
    """Tokens of the document in a file."""
    with BlockFile(path) as file:
        return int(told(file)["tokens"])
