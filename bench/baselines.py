"""What methods are compared with besides dense: chance, at the same bytes or with as many tokens read."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import comb
from typing import Literal

import torch

from kvote.method import Method
from kvote.needs import WHOLE, Needs
from kvote.read.in_prompts import InPrompts
from kvote.read.reader import Everything, Reading
from kvote.tokens import Span, TokenSet

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


@dataclass(frozen=True)
class RandomPrompts(InPrompts):
    """Rows of a prompt read their own block of ``block`` tokens, sinks, and tokens drawn by lot for all of them, of
    these two ``top_k`` together; generated tokens read everything."""

    top_k: int = 256
    block: int = 16
    own_needs = Needs(lists=True)
    own_cuts = WHOLE

    def read_prompt(self, reading: Reading, count: int) -> Iterator[Span]:
        reading.activity.selections += len(reading.rows)
        row = 0
        while row < count:
            slot = reading.first + row
            start = slot - slot % self.block
            stop = min(count, row + self.block - slot % self.block)
            near = TokenSet(range(start, reading.first + stop), causal=stop - row > 1)
            index = torch.arange(start)
            if start > self.top_k:
                generator = torch.Generator().manual_seed(1000 * start + reading.number)
                drawn = (
                    _SINKS + torch.randperm(start - _SINKS, generator=generator)[: self.top_k - _SINKS].sort().values
                )
                index = torch.cat([torch.arange(_SINKS), drawn])
            far = [TokenSet(index.expand(len(reading.rows), 1, -1), causal=False)] if start else []
            reading.activity.tokens_read = len(index) + len(near)
            yield Span(row, stop, [*far, near])
            row = stop


def random_prompts(tokens: int, block: int) -> Method:
    """Each row of a prompt reads ``tokens`` tokens, its own block of ``block`` among them."""
    reader = RandomPrompts(top_k=tokens - block, block=block)
    return Method(f"random prompts, {tokens} tokens, blocks of {block}", read=reader)


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
