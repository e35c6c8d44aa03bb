"""What methods are compared with besides dense: chance, at the same bytes or with as many tokens read."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import Literal

import torch

from kvote.method import Method
from kvote.read.tokens import Everything, Reading, Span, TokenSet

# Two answers count as different if chance alone would make such a difference less often than this.
LEVEL = 0.01
_SINKS = 4


@dataclass(frozen=True)
class RandomSteps(Everything):
    """Generated tokens read sinks, themselves and tokens drawn by lot, ``top_k`` together; prompts, and the first
    ``dense`` layers, read everything."""

    top_k: int = 256
    dense: int = 2

    def read(self, reading: Reading) -> Iterator[Span]:
        n = reading.first + reading.count
        if not reading.decode or reading.number < self.dense or n <= self.top_k:
            yield from super().read(reading)
            return
        generator = torch.Generator().manual_seed(1000 * n + reading.number)
        drawn = _SINKS + torch.randperm(n - 1 - _SINKS, generator=generator)[: self.top_k - 1 - _SINKS].sort().values
        index = torch.cat([torch.arange(_SINKS), drawn, torch.tensor([n - 1])])
        reading.activity.tokens_read = len(index)
        reading.activity.selections += len(reading.rows)
        yield Span(0, 1, [TokenSet(index.expand(len(reading.rows), 1, -1))])


def random_steps(top_k: int, dense: int) -> Method:
    """Prompts are read whole, generated tokens read ``top_k`` random ones."""
    # Two layers is what most of those have with which it is compared.
    layers = "" if dense == 2 else f", {dense} layers whole"
    return Method(f"random generated steps, {top_k} tokens{layers}", read=RandomSteps(top_k=top_k, dense=dense))


Verdict = Literal["beats", "equals", "loses"]


def verdict(mine: str, other: str) -> tuple[Verdict, float]:
    """Whether the answers ``mine`` are better than ``other``'s to the same questions ('1' is right), and how likely
    chance makes such a difference: the exact sign test over questions that only one of them answered."""
    won = sum(a > b for a, b in zip(mine, other, strict=True))
    lost = sum(a < b for a, b in zip(mine, other, strict=True))
    n = won + lost
    tail = sum(comb(n, k) for k in range(min(won, lost) + 1)) / 2**n
    p = min(1.0, 2 * tail)
    if p >= LEVEL:
        return "equals", p
    return ("beats" if won > lost else "loses"), p
