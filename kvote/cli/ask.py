"""``kvote ask``: read a document once per method, ask it, and put the answers beside each other."""

import argparse

from rich.progress import Progress

from kvote import Document
from kvote.cli.arguments import ALL, COMPARED
from kvote.cli.kept import kept, tokens_in
from kvote.cli.load import Loaded, load, quiet, sentence
from kvote.cli.outcome import Outcome, Run
from kvote.cli.plain import plain, warn
from kvote.cli.progress import progress
from kvote.cli.room import check_memory
from kvote.cli.show import show
from kvote.cli.subject import Subject, subject
from kvote.errors import InputError, KvoteError
from kvote.files import check_writable
from kvote.method import parse
from kvote.models.presets import with_presets


def run(args: argparse.Namespace) -> None:
    """Answers with ``--method`` and then with every ``--compare``, and prints both."""
    names = _names(args.method, args.compare)
    for name in names:
        parse(name)
    if args.load is not None and len(names) > 1:
        raise InputError("--load answers with the method in the file; leave --compare out.")
    if args.save is not None:
        check_writable(args.save)
    asked = subject(args)
    # Of a file alone, before a model is loaded for it.
    held = 0 if asked.text else tokens_in(args.load)
    loaded = load(args.model)
    specs = {name: with_presets(name) if loaded.is_embedded else name for name in names}
    text, question = loaded.ids(asked.text) if asked.text else [], loaded.ids(asked.question)
    tokens = len(text) or held
    for spec in specs.values():
        check_memory(loaded.model, parse(spec), tokens + len(question) + args.max_new_tokens)
    if loaded.is_embedded:
        _warn_of_foreign_words(loaded, text + question)
    with quiet(bars=False), progress() as bar:
        runs = [_answer(loaded, asked, name, spec, tokens, args, bar) for name, spec in specs.items()]
    outcome = Outcome(
        model=loaded.name,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        trained_tokens=loaded.trained,
        document=asked.name,
        tokens=tokens,
        question=asked.question,
        expected=asked.expected,
        answer=runs[0].answer,
        right=runs[0].right,
        runs=runs,
    )
    show(outcome, json=args.json)


def _names(method: str, compare: list[str]) -> list[str]:
    """Methods to run, each once, the answering one first."""
    others = [name for given in compare for name in (COMPARED if given == ALL else (given,))]
    return list(dict.fromkeys(name.strip() for name in (method, *others)))


def _answer(
    loaded: Loaded, asked: Subject, name: str, spec: str, tokens: int, args: argparse.Namespace, bar: Progress
) -> Run:
    task = bar.add_task(plain(name), total=tokens)
    try:
        if args.load is None:
            document = Document(
                loaded.model, loaded.tokenizer, asked.text, spec, progress=lambda count: bar.advance(task, count)
            )
        else:
            document = kept(loaded, asked, spec, args)
            name = spec = document.cache.method.spec
        if args.save is not None and (name == args.method or args.load is not None):
            document.save(args.save)
        answer = document.ask(asked.question, max_new_tokens=args.max_new_tokens)
    except KvoteError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
            raise InputError(f"Memory ran out with {name}; give a shorter document.") from error
        if loaded.is_embedded:
            raise
        # What a config says and transformers believed shows when the model runs.
        raise InputError(f"The model {loaded.name!r} cannot be run with {name}: {sentence(error)}") from error
    report = document.cache.report()
    return Run(
        name=name,
        method=spec,
        answer=answer.text,
        right=None if asked.expected is None else _is_right(answer.text, asked.expected, strict=loaded.is_embedded),
        prefill_seconds=round(document.prefill_seconds, 4),
        first_token_seconds=round(answer.first_token_seconds, 4),
        ms_per_token=None if answer.ms_per_token is None else round(answer.ms_per_token, 3),
        tokens_read=max(layer.tokens_read for layer in report.layers),
        kv_bytes=report.nbytes,
    )


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
