"""What the tokens of a text received from queries near them, and the blocks that are represented by it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvote.memory import storage_bytes
from kvote.store.segment import Scaling, Segment
from kvote.tokens import Queries, TokenSet


@dataclass(frozen=True)
class Passed:
    """Query rows [b, heads, t, d], the first of them token ``first``, the log-sum-exp [b, heads, t] of what they read,
    and the range of neighbours among that."""

    queries: Queries
    lse: Tensor
    first: int
    near: TokenSet
    scaling: Scaling

    def cut(self, length: int) -> "Passed | None":
        """What of it is about the first ``length`` tokens; None if nothing is."""
        count = min(self.lse.shape[2], length - self.first)
        if count <= 0:
            return None
        near = self.near.of_rows(self.lse.shape[2], 0, count)
        return Passed(self.queries.rows(0, count), self.lse[:, :, :count], self.first, near, self.scaling)

    def of(self, i: int) -> "Passed":
        """The same of one sequence."""
        one = slice(i, i + 1)
        return Passed(self.queries.of_sequences(one), self.lse[one], self.first, self.near, self.scaling)

    def mass(self, segment: Segment, rows: list[int]) -> Tensor:
        """Attention [b, heads, m] that each of the neighbours received from every query head, in float32."""
        h, heads = segment.heads, self.lse.shape[1]
        parts = []
        for i in range(heads // h):
            mine = slice(i, None, heads // h)
            lse = self.lse[:, mine].contiguous()
            mass = segment.attention_mass(self.queries.of_heads(mine), lse, rows, self.near, self.scaling)
            parts.append(mass[:, :, 0])
        return torch.stack(parts, dim=2).flatten(1, 2)


@dataclass(frozen=True)
class Blocks:
    """``keys`` [blocks, heads, d] that represent a sequence's blocks; attention ``mass`` [heads, n] of later tokens."""

    keys: Tensor
    mass: Tensor

    def plus(self, mass: Tensor, start: int, edge: int) -> "Blocks":
        """With what the tokens from ``start`` on have received; ``edge``: the first token of ``mass`` here."""
        new = mass[:, max(0, edge - start) :]
        at = max(0, start - edge)
        total = new.new_zeros(len(new), max(self.mass.shape[1], at + new.shape[1]))
        total[:, : self.mass.shape[1]] = self.mass
        total[:, at : at + new.shape[1]] += new
        return Blocks(self.keys, total)


@dataclass
class LocalMass:
    """By sequence: its blocks, and, while a caller may roll back, what they were before that and what came since.

    ``sinks``: tokens before the first block; ``block``: tokens of one."""

    sinks: int
    block: int
    held: dict[int, Blocks] = field(default_factory=dict)
    before: dict[int, Blocks] = field(default_factory=dict)
    since: dict[int, list[Passed]] = field(default_factory=dict)

    def edge(self, row: int) -> int:
        """The first token that is in no block."""
        return self.sinks + self.block * (len(self.held[row].keys) if row in self.held else 0)

    def add(self, segment: Segment, rows: list[int], passed: Passed) -> None:
        """Counts what the queries of a pass gave to their neighbours."""
        assert isinstance(passed.near.index, range)
        for row, mass in zip(rows, passed.mass(segment, rows), strict=True):
            if row not in self.held:
                heads, d = passed.queries.rotated.shape[1::2]
                empty = passed.queries.rotated.new_empty(0, heads, d)
                self.held[row] = Blocks(empty, mass.new_empty(heads, 0))
            self.held[row] = self.held[row].plus(mass, passed.near.index.start, self.edge(row))

    def note(self, row: int, passed: Passed) -> None:
        """Remembers a pass that may be taken back; to be called before it is added."""
        if row not in self.since and row in self.held:
            self.before[row] = self.held[row]
        self.since[row] = [*self.since.get(row, []), passed]

    def settle(self, rows: list[int]) -> None:
        """What these sequences were shown so far will not be taken back."""
        for row in rows:
            self.before.pop(row, None)
            self.since.pop(row, None)

    def take_back(self, segment: Segment, lengths: list[int]) -> None:
        for row, length in enumerate(lengths):
            if row not in self.since:
                continue
            self.held.pop(row, None)
            if row in self.before:
                self.held[row] = self.before[row]
            for passed in self.since[row]:
                left = passed.cut(length)
                if left is not None:
                    self.add(segment, [row], left)
        self.settle(list(range(len(lengths))))

    def fits(self, lengths: list[int]) -> bool:
        """Whether all that is remembered is of tokens of sequences of these ``lengths``."""
        blocks = [*self.held.items(), *self.before.items()]
        there = {*self.held, *self.before, *self.since} <= set(range(len(lengths)))
        shaped = all(b.keys.dim() == 3 and b.mass.dim() == 2 and len(b.mass) == b.keys.shape[1] for _, b in blocks)
        if not (there and shaped):
            return False
        ends = [(row, self.sinks + self.block * len(b.keys) + b.mass.shape[1]) for row, b in blocks if len(b.keys)]
        near = [(row, passed.near.index) for row in self.since for passed in self.since[row]]
        ends += [(row, index.stop if isinstance(index, range) else lengths[row] + 1) for row, index in near]
        return all(end <= lengths[row] for row, end in ends)

    def select(self, index: list[int]) -> None:
        for name in ("held", "before", "since"):
            old: dict[int, Any] = getattr(self, name)
            setattr(self, name, {i: old[was] for i, was in enumerate(index) if was in old})

    def forget(self) -> None:
        self.held, self.before, self.since = {}, {}, {}

    def checkpoint(self) -> tuple[dict[int, Any], ...]:
        return dict(self.held), dict(self.before), dict(self.since)

    def restore(self, checkpoint: tuple[dict[int, Any], ...]) -> None:
        self.held, self.before, self.since = (dict(part) for part in checkpoint)

    @property
    def nbytes(self) -> int:
        blocks = [part for each in (*self.held.values(), *self.before.values()) for part in (each.keys, each.mass)]
        passed = [each for passes in self.since.values() for each in passes]
        waiting = [t for p in passed for t in (p.lse, p.queries.rotated, p.queries.unrotated) if t is not None]
        return storage_bytes([*blocks, *waiting])
