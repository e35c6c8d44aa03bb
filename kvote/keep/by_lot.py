"""Keeps tokens drawn by lot, besides sinks and a window: what every keeper has to beat at the same bytes."""

from dataclasses import dataclass, field

import torch

from kvote import kernels
from kvote.errors import MethodError
from kvote.keep.budget import Budget
from kvote.keep.keeper import Held, Kept
from kvote.keep.observation import Observation
from kvote.keep.policies import Plain
from kvote.numbers import check_whole

# Odd constants whose products scatter neighbouring positions over all of 32 bits.
_SPREAD, _MIX, _SALT = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
_BITS = (1 << 32) - 1


@dataclass
class Ended:
    """Sequences whose prompt has just ended."""

    rows: set[int] = field(default_factory=set)

    def select(self, index: list[int]) -> None:
        self.rows = {i for i, old in enumerate(index) if old in self.rows}

    def keep(self, row: int, slots: torch.Tensor) -> None:
        self.rows.discard(row)

    def truncate(self, row: int, length: int) -> None:
        pass

    @property
    def nbytes(self) -> int:
        return 0


@dataclass(frozen=True)
class KeepByLot(Plain):
    """Parameters as in ``methods/randomkeep.py``, which documents them."""

    budget: Budget
    sinks: int
    window: int
    seed: int
    drops: bool = field(default=True, init=False)
    waits: bool = field(default=True, init=False)
    while_generating: bool = field(default=False, init=False)
    per_layer: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_whole(self, sinks=0, window=1, seed=0)
        always = self.sinks + self.window
        if self.budget.unit == "tokens" and self.budget.amount < always:
            raise MethodError(
                f"budget must cover {self.sinks} sinks and a window of {self.window}, which always stay; "
                f"got {self.budget.amount}."
            )

    def new_memory(self) -> Ended:
        return Ended()

    def observes(self, ahead: int | None) -> bool:
        return ahead is not None and ahead <= 0

    def observe(self, seen: Observation, memory: Ended) -> None:
        if seen.ahead is not None and seen.count + seen.ahead > 0:
            memory.rows.update(seen.rows)

    def survivors(self, held: Held, memory: Ended) -> Kept | None:
        if held.row not in memory.rows:
            return None
        memory.rows.discard(held.row)
        edge = held.length - self.window
        drawn = held.budget - self.sinks - self.window
        if held.length <= max(held.budget, self.sinks + self.window):
            return None
        sinks, window = torch.arange(self.sinks), torch.arange(edge, held.length)
        if drawn <= 0:
            return Kept(torch.cat([sinks, window]))
        positions = held.segment.positions(held.row)[0][self.sinks : edge].cpu()
        return Kept(torch.cat([sinks, kernels.top_k(self.lots(positions)[None], drawn)[0] + self.sinks, window]))

    def lots(self, positions: torch.Tensor) -> torch.Tensor:
        """One number in [0, 1) per original position, which nothing else decides but ``seed``: a token that has won
        once wins against the same tokens again."""
        x = (positions.long() * _SPREAD + self.seed * _SALT) & _BITS
        for shift in (15, 13):
            x = ((x ^ (x >> shift)) * _MIX) & _BITS
        # As many bits as float32 keeps apart.
        return ((x ^ (x >> 16)) >> 8).float() / (1 << 24)
