"""What is asked about: the built-in document, or a text of the user's."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from kvote.cli.arguments import TOKENS
from kvote.errors import InputError
from kvote.models import world

_TASK, _SEED, _NEEDLES = "needle", 0, 4


@dataclass(frozen=True)
class Subject:
    """A text and a question. ``expected`` is the right answer where it is known."""

    name: str
    text: str
    question: str
    expected: str | None


def subject(args: argparse.Namespace) -> Subject:
    """The document and question that the arguments of ``ask`` name. Raises InputError for what cannot be asked."""
    if args.question is not None and not args.question.strip():
        raise InputError("The question is empty; ask something.")
    if args.document is None:
        return _built_in(args.tokens or TOKENS, args.question)
    if args.tokens is not None:
        raise InputError("--tokens sets the size of the built-in document; leave it out with --document.")
    if args.question is None:
        raise InputError("A document needs a question; add --question.")
    text = read_text(args.document)
    if not text.strip():
        raise InputError(f"{name_of(args.document)} is empty; give a text to read.")
    return Subject(name_of(args.document), text, args.question, None)


def _built_in(tokens: int, question: str | None) -> Subject:
    try:
        made = world.sample(_TASK, tokens, _SEED, _NEEDLES)
    except ValueError as error:
        raise InputError(f"--tokens {tokens} is too small for what the question asks: {error}") from error
    asked = made.questions[0]
    if question is not None:
        return Subject("built-in", made.document, question, None)
    return Subject("built-in", made.document, asked.prompt, asked.answer)


def name_of(document: str) -> str:
    """What messages call it."""
    return "standard input" if document == "-" else document


def read_text(document: str) -> str:
    """UTF-8 text of a file, - for standard input. Raises InputError for what is none."""
    name = name_of(document)
    try:
        data = sys.stdin.buffer.read() if document == "-" else Path(document).read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read {name}: {error.strerror or error}.") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{name} is not UTF-8 text; convert it to plain text first.")
    return text
