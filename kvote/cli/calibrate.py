"""``kvote calibrate``: measure what a method must know about a model, and write it to a file."""

import argparse
import json
from pathlib import Path

from torch import Tensor

from kvote.calibration import save
from kvote.calibration.measure import BLOCK, BLOCKS, blocks_of, measure_channels
from kvote.cli.load import Loaded, load
from kvote.cli.progress import progress
from kvote.cli.subject import name_of, read_text
from kvote.errors import InputError
from kvote.models import embedded, world

# Texts of the embedded model's language are drawn from here on: other numbers than any test or benchmark asks about.
_FIRST_SEED = 10**6
_FACTS = 4
# Tokens of a block left to questions and answers.
_ROOM = 64


def run(args: argparse.Namespace) -> None:
    """Measures and writes; says what was measured, and on how many tokens."""
    out = Path(args.out)
    if out.is_dir() or not out.parent.is_dir():
        why = "it is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise InputError(f"Cannot write {out}: {why}.")
    is_embedded = args.model is None or Path(args.model).resolve() == Path(embedded()).resolve()
    if args.text is None and not is_embedded:
        raise InputError("A model of your own needs a text to calibrate with; add --text FILE.")
    text = None if args.text is None else read_text(args.text)
    if text is not None and not text.strip():
        raise InputError(f"{name_of(args.text)} is empty; give a text to calibrate with.")
    loaded = load(args.model)
    limit = args.tokens or BLOCKS * BLOCK
    blocks = _own_texts(loaded, limit) if text is None else _blocks(loaded, text, limit)
    tokens = sum(block.numel() for block in blocks)
    with progress() as bar:
        task = bar.add_task(args.what, total=tokens)
        calibration = measure_channels(loaded.model, blocks, lambda count: bar.advance(task, count))
    save(calibration, args.out)
    layers = len(calibration.data["layers"])
    if args.json:
        told = {"what": args.what, "file": args.out, "model": loaded.name, "tokens": tokens, "layers": layers}
        print(json.dumps(told, indent=1))
        return
    print(f"{args.what} of {layers} layers, measured on {tokens:,} tokens: {args.out}")


def _blocks(loaded: Loaded, text: str, limit: int) -> list[Tensor]:
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids[0]
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
