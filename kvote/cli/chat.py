"""``kvote chat``: a conversation that stays in the cache, line by line."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from kvote import Conversation
from kvote.cli.load import Loaded, load, quiet
from kvote.cli.options import options_of
from kvote.cli.plain import plain, warn
from kvote.cli.reading import read_document
from kvote.cli.room import check_memory
from kvote.cli.subject import document_of, is_text
from kvote.errors import InputError
from kvote.spec import parse

_PROMPT, _BYE = "> ", ("/bye", "/exit", "/quit")
_HELP = "A line is a message. Ctrl-C ends an answer, /report shows what the cache holds, /bye or Ctrl-D leaves."


def run(args: argparse.Namespace) -> None:
    """Answers every line of standard input. Raises InputError for what cannot be read or run."""
    parse(args.method)
    if args.document == "-":
        raise InputError("Messages come from standard input; give the document as a file.")
    text = None if args.document is None else document_of(args.document)
    options = options_of(args)
    loaded = load(args.model, dtype=args.dtype, device=args.device, load_in=args.load_in)
    spec = loaded.spec(args.method)
    with quiet(bars=False):
        talk = _begin(loaded, spec, text, args)
        shows = sys.stdin is not None and sys.stdin.isatty() and not args.quiet
        if shows:
            warn(_HELP)
        for message in _messages(_PROMPT if shows else ""):
            if message == "/report":
                print(plain(str(talk.cache.report()) if len(talk) else "Nothing has been said yet."))
            elif not is_text(message):
                warn("this line is not UTF-8 text; say it in plain text.")
            else:
                _say(talk, message, options)


def _begin(loaded: Loaded, spec: str, text: str | None, args: argparse.Namespace) -> Conversation:
    if text is None:
        return Conversation(loaded.model, loaded.tokenizer, spec, system=args.system, raw=args.raw)
    tokens = len(loaded.ids(text))
    check_memory(loaded.model, parse(spec), 2 * tokens)
    return read_document(loaded, text, args.method, spec, args, tokens=tokens).chat()


def _messages(prompt: str) -> Iterator[str]:
    """Lines that say something, until the end or a word of farewell."""
    if sys.stdin is None:
        raise InputError("Standard input is closed, so that nothing can be said.")
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            if prompt:
                print()
            return
        except UnicodeDecodeError:
            raise InputError("Standard input is not UTF-8 text; say it in plain text.") from None
        if line in _BYE:
            return
        if line:
            yield line


def _say(talk: Conversation, message: str, options: dict[str, Any]) -> None:
    """Prints an answer as it comes; an interruption ends it, and the conversation goes on."""
    stream = talk.stream(message, **options)
    try:
        for piece in stream:
            sys.stdout.write(plain(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        stream.close()
    print(flush=True)
