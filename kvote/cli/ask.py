"""``kvote ask``: read a document once per method, ask it, and put the answers beside each other."""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from kvote import Answer, Document, Library
from kvote.cli.arguments import ALL, COMPARED
from kvote.cli.kept import kept, tokens_in
from kvote.cli.load import Loaded, load, quiet, sentence
from kvote.cli.options import most_tokens, options_of
from kvote.cli.outcome import Outcome, Run
from kvote.cli.plain import warn
from kvote.cli.reading import read_document
from kvote.cli.room import check_memory
from kvote.cli.show import Page
from kvote.cli.subject import Subject, subject
from kvote.errors import InputError, KvoteError
from kvote.files import check_writable
from kvote.prompt import layout_of
from kvote.spec import parse
from kvote.stream import Pieces


def run(args: argparse.Namespace) -> None:
    """Answers with ``--method`` and then with every ``--compare``, and prints both."""
    names = _names(args.method, args.compare)
    for name in names:
        parse(name)
    if args.queries is not None and args.question_first:
        raise InputError("--question-first reads the document with each question; leave --queries out.")
    if args.quiet and len(names) > 1:
        raise InputError("-q prints one answer alone; leave --compare out.")
    if args.load is not None and len(names) > 1:
        raise InputError("--load answers with the method in the file; leave --compare out.")
    if args.load is not None and (args.queries is not None or args.question_first):
        raise InputError("--load answers from what has been read; leave --queries and --question-first out.")
    if args.library is not None and (args.load is not None or args.queries is not None or args.question_first):
        raise InputError(
            "--library serves documents that are read by themselves; leave --load, --queries and --question-first out."
        )
    if args.save is not None:
        check_writable(args.save)
    streams = _streams(args)
    asked = subject(args)
    options = options_of(args)
    # Of a file alone, before a model is loaded for it.
    held = 0 if asked.text else tokens_in(args.load)
    loaded = load(args.model, dtype=args.dtype, device=args.device, load_in=args.load_in)
    layout = layout_of(loaded.tokenizer, system=args.system, raw=args.raw)
    specs = {name: loaded.spec(name) for name in names}
    text, questions = (
        loaded.ids(asked.text) if asked.text else [],
        [loaded.ids(question) for question in asked.questions],
    )
    tokens = len(text) or held
    longest = tokens + max(map(len, questions)) + most_tokens(args, layout.templated)
    for spec in specs.values():
        check_memory(loaded.model, parse(spec), longest)
    if loaded.is_embedded:
        _warn_of_foreign_words(loaded, [token for ids in (text, *questions) for token in ids])
    outcomes = [
        Outcome(
            model=loaded.name,
            dtype=str(loaded.model.dtype).removeprefix("torch."),
            trained_tokens=loaded.trained,
            document=asked.name,
            tokens=tokens,
            question=question,
            expected=expected,
        )
        for question, expected in zip(asked.questions, asked.expected, strict=True)
    ]
    page = Page(outcomes, json=args.json, quiet=args.quiet)
    with quiet(bars=False):
        for name, spec in specs.items():
            streamed = page.stream if streams and name == names[0] else None
            _ask_all(loaded, asked, name, spec, args, options, outcomes, streamed)
    page.show()


def _names(method: str, compare: list[str]) -> list[str]:
    """Methods to run, each once, the answering one first."""
    others = [name for given in compare for name in (COMPARED if given == ALL else (given,))]
    return list(dict.fromkeys(name.strip() for name in (method, *others)))


def _streams(args: argparse.Namespace) -> bool:
    """Whether the answer is shown as it comes."""
    beams = (args.num_beams or 1) > 1
    if args.stream and (beams or args.json):
        what = "--num-beams finds an answer at its end" if beams else "--json prints one object at the end"
        raise InputError(f"{what}; leave --stream out.")
    return sys.stdout.isatty() and not beams and not args.json if args.stream is None else bool(args.stream)


def _ask_all(
    loaded: Loaded,
    asked: Subject,
    name: str,
    spec: str,
    args: argparse.Namespace,
    options: dict[str, Any],
    outcomes: list[Outcome],
    streamed: Callable[[Outcome], Callable[[str], None]] | None,
) -> None:
    """Reads the document with one method and asks all questions; each outcome gets a run."""
    if args.load is None:
        tokens = outcomes[0].tokens
        document = _reading(loaded, name, lambda: _document(loaded, asked, name, spec, args, tokens))
    else:
        document = _reading(loaded, name, lambda: kept(loaded, asked, spec, args))
        name = spec = document.cache.method.spec
    if args.save is not None and (name == args.method or args.load is not None):
        document.save(args.save)
    for outcome in outcomes:
        pieces = None if streamed is None else Pieces(loaded.tokenizer, streamed(outcome))
        ask = partial(document.ask, outcome.question, question_first=args.question_first, streamer=pieces, **options)
        answer: Answer = _reading(loaded, name, ask)
        report = answer.report
        assert report is not None
        right = None
        if outcome.expected is not None:
            right = _is_right(answer.text, outcome.expected, strict=loaded.is_embedded)
        outcome.runs.append(
            Run(
                name=name,
                method=spec,
                answer=answer.text,
                right=right,
                prefill_seconds=round(document.prefill_seconds, 4),
                first_token_seconds=round(answer.first_token_seconds, 4),
                ms_per_token=None if answer.ms_per_token is None else round(answer.ms_per_token, 3),
                tokens_read=max(layer.tokens_read for layer in report.layers),
                kv_bytes=report.nbytes,
            )
        )


def _document(loaded: Loaded, asked: Subject, name: str, spec: str, args: argparse.Namespace, tokens: int) -> Document:
    library = None if args.library is None else Library(args.library)
    document = read_document(
        loaded,
        asked.text,
        name,
        spec,
        args,
        tokens=tokens,
        queries=args.queries,
        lazy=args.question_first,
        library=library,
    )
    if library is not None:
        library.flush()
    return document


def _reading(loaded: Loaded, name: str, run: Callable[[], Any]) -> Any:
    """What ``run`` gives. Raises InputError for what a model's files break in the middle of it."""
    try:
        return run()
    except KvoteError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
            raise InputError(f"Memory ran out with {name}; give a shorter document.") from error
        if loaded.is_embedded:
            raise
        # What a config says and transformers believed shows when the model runs.
        raise InputError(f"The model {loaded.name!r} cannot be run with {name}: {sentence(error)}") from error


def _is_right(answer: str, expected: str, *, strict: bool) -> bool:
    """The embedded model must say the answer and stop; others may go on behind it."""
    return answer == expected if strict else answer.startswith(expected)


def _warn_of_foreign_words(loaded: Loaded, ids: list[int]) -> None:
    foreign = ids.count(loaded.tokenizer.unk_token_id) / len(ids)
    if foreign > 0:
        warn(
            f"the embedded model does not know {foreign:.0%} of these words; it speaks only the small language of the "
            "built-in document, so name a --model that reads yours."
        )
