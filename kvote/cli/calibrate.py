"""``kvote calibrate``: measure what a method must know about a model, and write it to a file."""

import argparse
from collections.abc import Callable

import torch
from rich.progress import Progress
from torch import Tensor

from kvote.calibration import Calibration, save
from kvote.calibration.channels import KIND as CHANNELS
from kvote.calibration.gates import SINKS, STEPS, WINDOW, train_duo
from kvote.calibration.heads import DUO, RAZOR
from kvote.calibration.measure import (
    BLOCK,
    BLOCKS,
    blocks_of,
    measure_channels,
    measure_patterns,
    measure_rotated,
)
from kvote.calibration.needles import text_needles, world_needles
from kvote.calibration.patterns import KIND as PATTERNS
from kvote.calibration.patterns import TOKENS
from kvote.calibration.retrieval import TIMES, measure_razor
from kvote.calibration.rotated import KIND as ROTATED
from kvote.calibration.semantic import SAMPLES, measure_semantic
from kvote.calibration.spans import SEMANTIC
from kvote.calibration.texts import LONGEST, phrases, world_texts
from kvote.cli.load import Loaded, load, names_embedded
from kvote.cli.plain import as_json, one_line
from kvote.cli.progress import progress
from kvote.cli.subject import name_of, read_text
from kvote.errors import InputError, KvoteError
from kvote.files import check_writable
from kvote.models import world

# Texts of the embedded model's language are drawn from here on: other numbers than any test or benchmark asks about.
_FIRST_SEED = 10**6
_FACTS = 4
# Tokens of a block left to questions and answers.
_ROOM = 64
# The most tokens or steps that a calibration may take.
_MOST = 10**9
# Its gates part within so many texts.
_EMBEDDED_STEPS = 200

# Tokens of the longest and of the shortest text in which heads look for an answer.
_LONGEST, _SHORTEST = 8000, 256

# What was measured, and on how many tokens.
Measured = tuple[Calibration, int]


def run(args: argparse.Namespace) -> None:
    """Measures and writes; says what was measured, and on how many tokens."""
    check_writable(args.out)
    for name in ("tokens", "steps"):
        if (getattr(args, name) or 0) > _MOST:
            raise InputError(f"--{name} is at most {_MOST:,}.")
    if args.steps is not None and args.what != DUO:
        raise InputError(f"--steps is for --what {DUO}; leave it out.")
    text = _text(args)
    loaded = load(args.model)
    try:
        with progress("texts" if args.what in (DUO, SEMANTIC) else "tokens") as bar:
            calibration, tokens = _MEASURES[args.what](loaded, text, args, bar)
    except KvoteError:
        raise
    # What a model of the user's does with these texts is not known before.
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, MemoryError) as error:
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise InputError(f"{loaded.name} cannot be calibrated: {why}") from error
    save(calibration, args.out)
    layers = len(calibration.data["layers"])
    if args.json:
        told = {"what": args.what, "file": args.out, "model": loaded.name, "tokens": tokens, "layers": layers}
        print(as_json(told))
        return
    print(f"{args.what} of {layers} layers, measured on {tokens:,} tokens: {one_line(args.out)}")


def _text(args: argparse.Namespace) -> str | None:
    """The user's text; None where none is needed."""
    if args.what == RAZOR:
        if args.text is not None:
            raise InputError(f"{RAZOR} reads random tokens; leave out --text.")
        return None
    if args.text is None and not names_embedded(args.model):
        raise InputError("A model of your own needs a text to calibrate with; add --text FILE.")
    text = None if args.text is None else read_text(args.text)
    if text is not None and not text.strip():
        raise InputError(f"{name_of(args.text)} is empty; give a text to calibrate with.")
    return text


def _over_text(loaded: Loaded, text: str | None, args: argparse.Namespace, bar: Progress) -> Measured:
    limit = args.tokens or BLOCKS * BLOCK
    blocks = _own_texts(loaded, limit) if text is None else _blocks(loaded, text, limit)
    tokens = sum(block.numel() for block in blocks)
    task = bar.add_task(args.what, total=tokens)
    measure = measure_channels if args.what == CHANNELS else measure_rotated
    return measure(loaded.model, blocks, lambda count: bar.advance(task, count)), tokens


def _razor(loaded: Loaded, text: str | None, args: argparse.Namespace, bar: Progress) -> Measured:
    period = None if args.tokens is None else (min(args.tokens, loaded.trained or args.tokens) - 1) // TIMES
    calibration = measure_razor(loaded.model, period, loaded.tokenizer.all_special_ids)
    return calibration, calibration.data["tokens"]


def _duo(loaded: Loaded, text: str | None, args: argparse.Namespace, bar: Progress) -> Measured:
    longest = min(args.tokens or LONGEST, loaded.trained or LONGEST)
    if text is None and longest <= SINKS + WINDOW:
        raise InputError(
            f"No text is longer than the {SINKS + WINDOW} tokens that streaming heads see; allow longer ones."
        )
    texts = world_texts(longest, _FIRST_SEED) if text is None else phrases(loaded.tokenizer, text, longest)
    steps = args.steps or (_EMBEDDED_STEPS if loaded.is_embedded else STEPS)
    task = bar.add_task(args.what, total=steps)
    calibration = train_duo(loaded.model, texts, steps, progress=lambda step, loss: bar.update(task, completed=step))
    return calibration, calibration.data["tokens"]


def _semantic(loaded: Loaded, text: str | None, args: argparse.Namespace, bar: Progress) -> Measured:
    longest = min(args.tokens or _LONGEST, loaded.trained or _LONGEST)
    if longest < _SHORTEST:
        raise InputError(f"Texts of three facts and a question take {_SHORTEST} tokens; allow longer ones.")
    made = world_needles(longest, _FIRST_SEED) if text is None else text_needles(loaded.tokenizer, text, longest)
    task = bar.add_task(args.what, total=SAMPLES)
    calibration = measure_semantic(loaded.model, made, SAMPLES, progress=lambda count: bar.advance(task, count))
    return calibration, calibration.data["tokens"]


def _patterns(loaded: Loaded, text: str | None, args: argparse.Namespace, bar: Progress) -> Measured:
    limit = min(args.tokens or TOKENS, loaded.trained or TOKENS)
    if text is None:
        ids = torch.cat([block[0] for block in _own_texts(loaded, limit)])[:limit]
    else:
        ids = torch.tensor(loaded.tokenizer(text).input_ids, dtype=torch.long)[:limit]
    calibration = measure_patterns(loaded.model, ids[None])
    return calibration, len(ids)


_MEASURES: dict[str, Callable[[Loaded, str | None, argparse.Namespace, Progress], Measured]] = {
    CHANNELS: _over_text,
    ROTATED: _over_text,
    RAZOR: _razor,
    DUO: _duo,
    SEMANTIC: _semantic,
    PATTERNS: _patterns,
}


def _blocks(loaded: Loaded, text: str, limit: int) -> list[Tensor]:
    ids = torch.tensor(loaded.tokenizer(text).input_ids, dtype=torch.long)
    return blocks_of(ids[:limit])


def _own_texts(loaded: Loaded, limit: int) -> list[Tensor]:
    """Documents of every task with their questions and answers, each a block, at most ``limit`` tokens in all."""
    blocks: list[Tensor] = []
    left = limit
    for i in range(-(-limit // BLOCK)):
        made = world.sample(world.TASKS[i % len(world.TASKS)], BLOCK - _ROOM, _FIRST_SEED + i, _FACTS)
        parts = [made.document, *(f"{asked.prompt} {asked.answer}" for asked in made.questions)]
        ids = loaded.tokenizer(" ".join(parts), return_tensors="pt").input_ids[0]
        blocks += blocks_of(ids[: min(BLOCK, left)])
        left -= blocks[-1].numel()
    return blocks
