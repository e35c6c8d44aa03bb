"""What queries are usually like in a layer, by which the unusual ones among them count more."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kvote.memory import storage_bytes
from kvote.read.local_mass import LocalMass
from kvote.store.segment import Segment

# Windows of which the statistics are a mean, at most.
_WEIGHT = 1000


@dataclass(frozen=True)
class Habit:
    """Of one sequence: ``mean`` and ``variance`` [channels] of the queries of ``count`` windows, relative ``entropies``
    [k] of the latest scores of blocks, and how many ``blocks`` were read last."""

    mean: Tensor
    variance: Tensor
    count: int
    entropies: Tensor
    blocks: int = 0

    @staticmethod
    def of(queries: Tensor) -> "Habit":
        """After the first window of ``queries`` [m, channels]."""
        spread = queries.var(0, correction=min(1, len(queries) - 1))
        return Habit(queries.mean(0), spread, 1, queries.new_empty(0))

    def met(self, queries: Tensor) -> "Habit":
        """After another window."""
        m, c, mean = len(queries), min(self.count, _WEIGHT), queries.mean(0)
        spread = queries.var(0, correction=0) + (mean - self.mean).square() / (1 + 1 / c)
        variance = (self.variance * (c - 1 / m) + spread) / (c + 1 - 1 / m)
        return replace(self, mean=(self.mean * c + mean) / (c + 1), variance=variance, count=self.count + 1)

    def weights(self, queries: Tensor) -> Tensor:
        """Shares [m] of the queries in a probe: their mean squared deviation from the usual, each channel's measured by
        its variance."""
        least = torch.finfo(queries.dtype).tiny
        usual = (self.variance + self.variance.mean() / 100).clamp(min=least)
        deviation = ((queries - self.mean).square() / usual).mean(1).clamp(min=least)
        return deviation / deviation.sum()

    def scored(self, scores: Tensor, kept: int) -> "Habit":
        """After ``scores`` [blocks], of the relative entropy of whose softmax the last ``kept`` are remembered."""
        if len(scores) < 2:
            return self
        share = scores.softmax(0)
        entropy = (
            -(share * share.clamp(min=torch.finfo(share.dtype).tiny).log()).sum() / torch.tensor(len(scores)).log()
        )
        return replace(self, entropies=torch.cat([self.entropies, entropy[None]])[-kept:])


@dataclass
class Probed(LocalMass):
    """A ``LocalMass`` with the habit of every sequence, and, while a caller may roll back, what that was before each
    window: the window's end, and the habit."""

    habits: dict[int, Habit] = field(default_factory=dict)
    past: dict[int, list[tuple[int, Habit | None]]] = field(default_factory=dict)

    def settle(self, rows: list[int]) -> None:
        super().settle(rows)
        for row in rows:
            self.past.pop(row, None)

    def take_back(self, segment: Segment, lengths: list[int]) -> None:
        for row, length in enumerate(lengths):
            # A window that is cut in the middle is not counted.
            before = next((habit for end, habit in self.past.get(row, ()) if end > length), self.habits.get(row))
            self.habits.pop(row, None)
            if before is not None:
                self.habits[row] = before
        super().take_back(segment, lengths)

    def select(self, index: list[int]) -> None:
        super().select(index)
        self.habits = {i: self.habits[was] for i, was in enumerate(index) if was in self.habits}
        self.past = {i: self.past[was] for i, was in enumerate(index) if was in self.past}

    def forget(self) -> None:
        super().forget()
        self.habits, self.past = {}, {}

    def checkpoint(self) -> tuple[dict[int, Any], ...]:
        return *super().checkpoint(), dict(self.habits), {row: list(habits) for row, habits in self.past.items()}

    def restore(self, checkpoint: tuple[dict[int, Any], ...]) -> None:
        super().restore(checkpoint[:3])
        self.habits, self.past = dict(checkpoint[3]), {row: list(habits) for row, habits in checkpoint[4].items()}

    def fits(self, lengths: list[int]) -> bool:
        return super().fits(lengths) and {*self.habits, *self.past} <= set(range(len(lengths)))

    @property
    def nbytes(self) -> int:
        habits = [*self.habits.values(), *(h for past in self.past.values() for _, h in past if h is not None)]
        return super().nbytes + storage_bytes([t for h in habits for t in (h.mean, h.variance, h.entropies)])
