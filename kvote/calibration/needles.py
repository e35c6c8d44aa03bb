"""Texts that say a few facts and ask for one of them: where it is said, and where the answer begins."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvote.calibration.measure import check_enough
from kvote.errors import InputError
from kvote.models import world

_FACTS = 3
_CITIES = "Lisbon Oslo Quito Cairo Hanoi Dublin Nairobi Lima Prague Seoul".split()
# Tokens between the first and the last piece of a text that are left to facts and question.
_LEAST = 64


@dataclass(frozen=True)
class Needle:
    """``ids`` [1, n] of document, question and answer; the ``span`` that says the answer; tokens of the ``prompt``."""

    ids: Tensor
    span: range
    prompt: int


def world_needles(longest: int, seed: int = 0) -> Iterator[Needle]:
    """Without end: documents of the embedded model's language, from half of ``longest`` tokens to that."""
    draw = np.random.default_rng(seed)
    while True:
        plan = world.plan("needle", draw, _FACTS, 1)
        ask = plan.asks[0]
        length = int(draw.integers(longest // 2, longest + 1)) - len(ask.prompt) - len(ask.answer)
        document, places = world.lay_out(plan.facts, length, draw)
        start = places[ask.fact]
        yield _needle(document.tolist(), start, len(plan.facts[ask.fact]), ask.prompt.tolist(), ask.answer.tolist())


def text_needles(tokenizer: Any, text: str, longest: int, seed: int = 0) -> Iterator[Needle]:
    """Without end: pieces of ``text`` with three facts about cities in them, from half of ``longest`` tokens to that.

    Raises InputError for a text that says next to nothing, and where facts and question alone are longer.
    """
    draw = np.random.default_rng(seed)

    def ids(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False).input_ids)

    hay, begin = ids(text), [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    check_enough(len(hay))
    while True:
        cities = list(draw.choice(_CITIES, _FACTS, replace=False))
        numbers = [f"{n}" for n in draw.integers(100_000, 1_000_000, _FACTS)]
        facts = [ids(f"\nThe code for {city} is {number}.\n") for city, number in zip(cities, numbers, strict=True)]
        asked = int(draw.integers(_FACTS))
        question, answer = ids(f"\nThe code for {cities[asked]} is"), ids(f" {numbers[asked]}.")
        room = longest - len(begin) - len(question) - len(answer) - sum(map(len, facts))
        if room < _LEAST:
            raise InputError(f"{longest:,} tokens do not hold three facts and a question; allow longer texts.")
        length = int(draw.integers(room // 2, room + 1))
        piece = np.resize(np.roll(hay, -int(draw.integers(len(hay)))), length).tolist()
        cuts = [0, *sorted(draw.integers(0, length, _FACTS).tolist()), length]
        document, places = list(begin), []
        for i, fact in enumerate(facts):
            document += piece[cuts[i] : cuts[i + 1]]
            places.append(len(document))
            document += fact
        yield _needle(document + piece[cuts[-2] :], places[asked], len(facts[asked]), question, answer)


def _needle(document: list[int], start: int, size: int, question: list[int], answer: list[int]) -> Needle:
    ids = torch.tensor([[*document, *question, *answer]])
    return Needle(ids, range(start, start + size), len(document) + len(question))
