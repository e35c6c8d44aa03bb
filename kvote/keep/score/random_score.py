"""Tokens drawn at random: what every other score has to beat at the same bytes."""

from dataclasses import dataclass, field

from torch import Tensor

from kvote.keep.keeper import Held
from kvote.keep.observation import Observation
from kvote.keep.score.score import Score
from kvote.numbers import check_whole

# Odd constants whose products scatter neighbouring positions over all of 32 bits.
_SPREAD, _MIX, _SALT = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
_BITS = (1 << 32) - 1


@dataclass
class EndedPrompts:
    """Sequences whose prompt has just ended."""

    rows: set[int] = field(default_factory=set)

    def select(self, index: list[int]) -> None:
        self.rows = {i for i, old in enumerate(index) if old in self.rows}

    def keep(self, row: int, slots: Tensor) -> None:
        self.rows.discard(row)

    def truncate(self, row: int, length: int) -> None:
        pass

    @property
    def nbytes(self) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class RandomScore(Score):
    """One number in [0, 1) per original position, which nothing else decides but ``seed``: a token that has won once
    wins against the same tokens again. The same for all heads and layers; drawn at the end of a prompt."""

    seed: int
    per_head: bool = False
    per_layer = False
    spare = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, seed=0)

    def new_memory(self) -> EndedPrompts:
        return EndedPrompts()

    def observes(self, prompt_left: int | None) -> bool:
        return prompt_left is not None and prompt_left <= 0

    def observe(self, seen: Observation, memory: EndedPrompts) -> None:
        if seen.prompt_left is not None and seen.count + seen.prompt_left > 0:
            memory.rows.update(seen.rows)

    def ended(self, held: Held, memory: EndedPrompts) -> bool:
        return held.row in memory.rows

    def of(self, held: Held, memory: EndedPrompts, edge: int) -> Tensor:
        return self.random_worth(held.segment.positions(held.row)[0][:edge].cpu())[None]

    def settled(self, held: Held, memory: EndedPrompts, over: bool) -> None:
        memory.rows.discard(held.row)

    def random_worth(self, positions: Tensor) -> Tensor:
        # As many bits as float32 keeps apart.
        return (hashed(positions.long() * _SPREAD + self.seed * _SALT) >> 8).float() / (1 << 24)


def hashed(x: Tensor) -> Tensor:
    """32 bits of each whole number (int64), so that neighbours have nothing to do with each other."""
    x = x & _BITS
    for shift in (15, 13):
        x = ((x ^ (x >> shift)) * _MIX) & _BITS
    return x ^ (x >> 16)
