"""The text that is asked about: the built-in document, or one of the user's."""

import argparse
import sys
from dataclasses import dataclass

from kvote.cli.arguments import TOKENS
from kvote.cli.room import gib
from kvote.env import memory
from kvote.errors import InputError
from kvote.files import at_most, read_regular, reason
from kvote.models import world

_TASK, _SEED, _NEEDLES = "needle", 0, 4
# Bytes of the built-in document's words, ids and text, per token, while it is made.
_MAKING = 100
# Bytes of a document where the system does not say how much memory is free.
_MOST = 2**32


@dataclass(frozen=True)
class Subject:
    """A text, empty where it is in a saved file only, and questions about it. ``expected``: the right answers, where
    they are known."""

    name: str
    text: str
    questions: list[str]
    expected: list[str | None]


def subject(args: argparse.Namespace) -> Subject:
    """The document and questions that the arguments of ``ask`` name. Raises InputError for what cannot be asked."""
    for question in args.question or ():
        if not question.strip():
            raise InputError("The question is empty; ask something.")
        if not is_text(question):
            raise InputError("The question is not UTF-8 text; ask it in plain text.")
    if args.document is None and args.load is not None:
        if args.question is None or args.tokens is not None:
            raise InputError("--load answers about what is in the file: it needs --question, and takes no --tokens.")
        return Subject(args.load, "", args.question, [None] * len(args.question))
    if args.document is None:
        return _built_in(args.tokens or TOKENS, args.question)
    if args.tokens is not None:
        raise InputError("--tokens sets the size of the built-in document; leave it out with --document.")
    if args.question is None:
        raise InputError("A document needs a question; add --question.")
    text = document_of(args.document)
    return Subject(name_of(args.document), text, args.question, [None] * len(args.question))


def _built_in(tokens: int, questions: list[str] | None) -> Subject:
    needed, free = tokens * _MAKING, memory()[1]
    if free and needed > free:
        raise InputError(
            f"A document of {tokens:,} tokens takes {gib(needed)} GiB to make, and {gib(free)} GiB are free; give "
            "fewer --tokens."
        )
    try:
        made = world.sample(_TASK, tokens, _SEED, _NEEDLES)
    except ValueError as error:
        raise InputError(f"--tokens {tokens} is too small for what the question asks: {error}") from error
    asked = made.questions[0]
    if questions is not None:
        return Subject("built-in", made.document, questions, [None] * len(questions))
    return Subject("built-in", made.document, [asked.prompt], [asked.answer])


def document_of(document: str) -> str:
    """The text to read. Raises InputError as ``read_text``, and for an empty one."""
    text = read_text(document)
    if not text.strip():
        raise InputError(f"{name_of(document)} is empty; give a text to read.")
    return text


def name_of(document: str) -> str:
    """The name of the text in messages."""
    return "standard input" if document == "-" else document


def read_text(document: str) -> str:
    """UTF-8 text of a regular file, - for standard input. Raises InputError for what is none, or fills the memory."""
    name, most = name_of(document), memory()[1] or _MOST
    data = _standard_input(most) if document == "-" else read_regular(document, most)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if not is_text(text):
        raise InputError(f"{name} is not UTF-8 text; convert it to plain text first.")
    return text


def is_text(text: str) -> bool:
    """Whether a tokenizer can read it: no NUL, and none of the surrogates that stand for bytes outside UTF-8."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in set(text))


def _standard_input(most: int) -> bytes:
    if sys.stdin is None:
        raise InputError("Standard input is closed; give a file.")
    try:
        data = at_most(sys.stdin.buffer, most)
    except OSError as error:
        raise InputError(f"Cannot read standard input: {reason(error)}.") from error
    if data is None:
        raise InputError(f"Standard input holds more than {most:,} bytes, which is all the memory that is free.")
    return data
