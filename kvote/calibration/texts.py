"""Texts to train head gates with: a question at the end whose answer lies somewhere far before it."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kvote.calibration.gates import Example
from kvote.calibration.measure import check_enough
from kvote.errors import InputError
from kvote.models import world

# As published: ten phrases of 32 words, in 50 lengths of text from 1,000 tokens on, at depths from 5% to 95%.
SHORTEST, LONGEST = 1000, 32_000
_LENGTHS, _PHRASES, _WORDS, _DEPTHS = 50, 10, 32, 1000
_SPELLED = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
).split()
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
_FACTS = 4


def phrases(tokenizer: Any, text: str, longest: int = LONGEST, seed: int = 0) -> Iterator[Example]:
    """Without end: a piece of ``text``, ten pass phrases in it, and ten questions for them, up to ``longest`` tokens.

    The text is begun anew where it is too short. Questions and answers are labelled. Raises InputError for a text that
    says next to nothing, and where the phrases and questions alone are longer than ``longest``.
    """
    draw = np.random.default_rng(seed)

    def ids(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False).input_ids)

    hay, begin = ids(text), [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    check_enough(len(hay))
    while True:
        said = [" ".join(draw.choice(_SPELLED, _WORDS)) for _ in range(_PHRASES)]
        facts = [ids(f"\nRemember the {o} pass phrase: {p}.\n") for o, p in zip(_ORDINALS, said, strict=True)]
        asked = [ids(f"\nWhat is the {o} pass phrase? {p}.") for o, p in zip(_ORDINALS, said, strict=True)]
        turns = [token for each in asked for token in each]
        most = longest - len(begin) - len(turns) - sum(map(len, facts))
        if most < 1:
            raise InputError(
                f"{longest:,} tokens do not hold ten pass phrases and the questions for them, which take "
                f"{longest - most:,}; allow longer texts."
            )
        length, offset = (
            int(draw.choice(np.linspace(min(SHORTEST, most), most, _LENGTHS))),
            int(draw.integers(len(hay))),
        )
        piece = np.resize(np.roll(hay, -offset), length).tolist()
        depths = sorted(draw.choice(np.linspace(0.05, 0.95, _DEPTHS), _PHRASES, replace=False))
        cuts = [0, *(int(depth * length) for depth in depths)]
        told: list[int] = [*begin]
        for start, stop, fact in zip(cuts, cuts[1:], facts, strict=False):
            told += piece[start:stop] + fact
        yield _example(told + piece[cuts[-1] :] + turns, len(turns))


def world_texts(longest: int, seed: int = 0) -> Iterator[Example]:
    """Without end: documents of the embedded model's language, up to ``longest`` tokens, every task in turn.

    Each is at least half as long and asks for all that it says; questions and answers are labelled.
    """
    draw, turn = np.random.default_rng(seed), 0
    while True:
        plan = world.plan(world.TASKS[turn % len(world.TASKS)], draw, _FACTS, _FACTS)
        end = np.array([world.EOT])
        turns = np.concatenate([part for ask in plan.asks for part in (ask.prompt, ask.answer, end)])
        length = int(draw.integers(longest // 2, longest + 1))
        document, _ = world.lay_out(plan.facts, length - len(turns), draw)
        yield _example([*document.tolist(), *turns.tolist()], len(turns))
        turn += 1


def _example(ids: list[int], labelled: int) -> Example:
    labels = torch.zeros(len(ids), dtype=torch.bool)
    labels[-labelled:] = True
    return Example(torch.tensor(ids)[None], labels)
