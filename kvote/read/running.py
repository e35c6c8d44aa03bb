"""Running sentence: where sentences of a text end, and the queries of the one that is being generated."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvote.memory import storage_bytes


@dataclass(frozen=True)
class Running:
    """Of one sequence: the positions ``ends`` [e] of tokens that end a sentence, ascending, and of the sentence that is
    being generated the ``queries`` [m, heads, d] and their positions ``at`` [m]."""

    ends: Tensor
    queries: Tensor
    at: Tensor

    def before(self, position: int) -> "Running":
        """What it was when that position came next."""
        stays = self.at < position
        return Running(self.ends[self.ends < position], self.queries[stays], self.at[stays])

    def read(self, positions: Tensor, ends: Tensor) -> "Running":
        """After tokens of a prompt, of which those where bool ``ends`` [t] is set end a sentence."""
        return Running(torch.cat([self.ends, positions[ends]]), self.queries[:0], self.at[:0])

    def generated(self, position: Tensor, ends: bool, query: Tensor) -> "Running":
        """After a generated token at ``position`` [1], with its ``query`` [heads, d]."""
        closed = self.ends
        if len(self.at) == 0 and (len(closed) == 0 or closed[-1] < position - 1):
            # A prompt's end ends a sentence, too.
            closed = torch.cat([closed, position - 1])
        if ends:
            return Running(torch.cat([closed, position]), self.queries[:0], self.at[:0])
        return Running(closed, torch.cat([self.queries, query[None]]), torch.cat([self.at, position]))


@dataclass(frozen=True)
class Grouped:
    """The sentence ``of`` [h, c] each of the first tokens held, and the mean ``keys`` [h, sentences, d] of those."""

    of: Tensor
    keys: Tensor


@dataclass
class Sentences:
    """By sequence: its sentences, and what is known of the tokens that are held of them.

    Sentences are known by positions in the text. So they outlive it when other tokens are dropped, and after a
    rollback whoever reads next passes over what is behind its first token (``Running.before``).
    """

    rows: dict[int, Running] = field(default_factory=dict)
    grouped: dict[int, Grouped] = field(default_factory=dict)

    def select(self, index: list[int]) -> None:
        for name in ("rows", "grouped"):
            old: dict[int, Any] = getattr(self, name)
            setattr(self, name, {i: old[was] for i, was in enumerate(index) if was in old})

    def forget(self) -> None:
        self.grouped = {}

    def checkpoint(self) -> dict[int, Running]:
        return dict(self.rows)

    def restore(self, checkpoint: dict[int, Running]) -> None:
        self.rows, self.grouped = dict(checkpoint), {}

    def fits(self, lengths: list[int]) -> bool:
        """Whether what is remembered is of sequences that there are."""
        return set(self.rows) <= set(range(len(lengths)))

    @property
    def nbytes(self) -> int:
        known = [t for each in self.grouped.values() for t in (each.of, each.keys)]
        return storage_bytes([*known, *(t for each in self.rows.values() for t in (each.ends, each.queries, each.at))])
