"""Exchanges of a prompt and an answer: where the answer began, and which queries choose what it reads."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvote.memory import storage_bytes
from kvote.store.segment import Segment


@dataclass(frozen=True)
class Exchange:
    """Of one sequence: the answer began at slot ``edge``; the queries ``asked`` [heads, m, d] choose what it reads,
    ``of_prompt`` if they are its last m; ``recent`` [heads, r, d] have come since."""

    edge: int
    asked: Tensor
    recent: Tensor
    of_prompt: bool

    def prompted(self, first: int, queries: Tensor, window: int) -> "Exchange":
        """After tokens of a prompt, the first at slot ``first``, with their ``queries`` [heads, t, d]: the last
        ``window`` of a prompt choose."""
        asked = torch.cat([self.asked, queries], dim=1) if self.of_prompt and self.edge == first else queries
        return Exchange(first + queries.shape[1], asked[:, -window:].clone(), queries[:, :0].clone(), True)

    def answered(self, query: Tensor) -> "Exchange":
        """After a generated token, with its ``query`` [heads, 1, d]."""
        return Exchange(self.edge, self.asked, torch.cat([self.recent, query], dim=1), self.of_prompt)

    def renewed(self) -> "Exchange":
        """From here on, the recent queries choose."""
        return Exchange(self.edge, self.recent, self.recent[:, :0].clone(), False)


@dataclass(frozen=True)
class Shown:
    """A pass that may be taken back: its first slot, its ``queries`` [heads, t, d], and what was known ``before``."""

    first: int
    queries: Tensor
    before: Exchange


@dataclass
class Exchanges:
    """By sequence: its exchange, what it reads of the prompt (``chosen`` [heads, k]), and, while a caller may roll
    back, the passes since then. ``window``: the last queries of a prompt that choose."""

    window: int
    rows: dict[int, Exchange] = field(default_factory=dict)
    chosen: dict[int, Tensor] = field(default_factory=dict)
    past: dict[int, list[Shown]] = field(default_factory=dict)

    def of(self, row: int, queries: Tensor) -> Exchange:
        """The exchange of a sequence; ``queries`` [heads, t, d] are of the kind that it has."""
        none = queries[:, :0].clone()
        return self.rows.get(row, Exchange(0, none, none, True))

    def note(self, row: int, first: int, queries: Tensor) -> None:
        """Remembers a pass that may be taken back; to be called before it changes the exchange."""
        shown = Shown(first, queries.clone(), self.of(row, queries))
        self.past[row] = [*self.past.get(row, []), shown]

    def settle(self, rows: list[int]) -> None:
        """What these sequences were shown so far will not be taken back."""
        for row in rows:
            self.past.pop(row, None)

    def take_back(self, segment: Segment, lengths: list[int]) -> None:
        for row, length in enumerate(lengths):
            for shown in self.past.pop(row, []):
                count = length - shown.first
                if count < shown.queries.shape[1]:
                    self.chosen.pop(row, None)
                    left = shown.queries[:, : max(0, count)]
                    # Only a prompt can be cut in the middle.
                    self.rows[row] = (
                        shown.before.prompted(shown.first, left, self.window) if count > 0 else shown.before
                    )
                    break

    def fits(self, lengths: list[int]) -> bool:
        """Whether all that is remembered is of tokens of sequences of these ``lengths``."""
        if not {*self.rows, *self.chosen, *self.past} <= set(range(len(lengths))):
            return False
        ends = [(row, exchange.edge) for row, exchange in self.rows.items()]
        ends += [(row, each.first + each.queries.shape[1]) for row, passes in self.past.items() for each in passes]
        ends += [(row, int(index.max()) + 1) for row, index in self.chosen.items() if index.numel()]
        low = all(int(index.min()) >= 0 for index in self.chosen.values() if index.numel())
        return low and all(0 <= end <= lengths[row] for row, end in ends)

    def select(self, index: list[int]) -> None:
        for name in ("rows", "chosen", "past"):
            old: dict[int, Any] = getattr(self, name)
            setattr(self, name, {i: old[was] for i, was in enumerate(index) if was in old})

    def forget(self) -> None:
        self.rows, self.chosen, self.past = {}, {}, {}

    def checkpoint(self) -> tuple[dict[int, Any], ...]:
        return dict(self.rows), dict(self.chosen), dict(self.past)

    def restore(self, checkpoint: tuple[dict[int, Any], ...]) -> None:
        self.rows, self.chosen, self.past = (dict(part) for part in checkpoint)

    @property
    def nbytes(self) -> int:
        exchanges = [*self.rows.values(), *(each.before for passes in self.past.values() for each in passes)]
        queries = [each.queries for passes in self.past.values() for each in passes]
        held = [t for each in exchanges for t in (each.asked, each.recent)]
        return storage_bytes([*self.chosen.values(), *held, *queries])
