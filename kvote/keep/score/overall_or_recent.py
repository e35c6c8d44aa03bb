"""Attention received from all queries and from the last ones, whichever says more."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote.keep.keeper import Held
from kvote.keep.observation import Observation
from kvote.keep.score.mass import Mass
from kvote.keep.score.score import Score
from kvote.numbers import check_whole


@dataclass
class Importance:
    """By sequence: attention received from all queries, or what a merged token's class is worth (``overall_mass``), and
    from the last ones (``recent_mass``); ``due``: sequences whose prompt has just ended."""

    overall_mass: Mass = field(default_factory=Mass)
    recent_mass: Mass = field(default_factory=Mass)
    due: set[int] = field(default_factory=set)

    def score(self, row: int) -> Tensor:
        """The larger of both [h, n], once they have the same mean in each head."""
        everywhere, lately = self.overall_mass.rows[row], self.recent_mass.rows.get(row)
        if lately is None:
            return everywhere
        # A head that nothing looked at gives nothing.
        scale = lately.mean(dim=-1, keepdim=True) / everywhere.mean(dim=-1, keepdim=True).clamp_min(1e-20)
        return torch.maximum(everywhere * scale, lately)

    def inherit(self, row: int, worth: Tensor) -> None:
        """Sets the worth of the tokens that stay of a sequence to ``worth`` [h, m], which counts what was merged into
        them."""
        together = self.overall_mass.rows[row].shape[0] == 1
        self.overall_mass.rows[row] = worth.mean(dim=0, keepdim=True) if together else worth

    def select(self, index: list[int]) -> None:
        self.overall_mass.select(index)
        self.recent_mass.select(index)
        self.due = {i for i, old in enumerate(index) if old in self.due}

    def keep(self, row: int, slots: Tensor) -> None:
        # What is merged has inherited its worth already.
        pass

    def truncate(self, row: int, length: int) -> None:
        self.overall_mass.truncate(row, length)
        self.recent_mass.truncate(row, length)

    @property
    def nbytes(self) -> int:
        return self.overall_mass.nbytes + self.recent_mass.nbytes


@dataclass(frozen=True, kw_only=True)
class OverallOrRecent(Score):
    """The last queries are a prompt's last ``window`` ones and, with ``generated``, those of generated tokens."""

    window: int
    generated: bool = True
    adds_up = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, window=1)

    @property
    def token_bytes(self) -> int:
        # Attention from all queries, and, where more are coming, from the last ones.
        return 8 if self.generated else 4

    def new_memory(self) -> Importance:
        return Importance()

    def observes(self, prompt_left: int | None) -> bool:
        return prompt_left is not None or self.generated

    def observe(self, seen: Observation, memory: Importance) -> None:
        end = seen.count if seen.prompt_left is None else seen.count + seen.prompt_left
        # Queries behind a prompt's end are those of generated tokens.
        stop = seen.count if self.generated else max(0, min(seen.count, end))
        # Generated queries are all recent ones: tokens are merged again before they are more than a window.
        start = 0 if seen.prompt_left is None else max(0, min(seen.count, end - self.window))
        early = self.shared(seen.mass(0, start)) if start else None
        late = self.shared(seen.mass(start, stop))
        for i, row in enumerate(seen.rows):
            memory.overall_mass.add(row, late[i] if early is None else early[i] + late[i])
            if seen.prompt_left is not None and end - self.window >= 0:
                # The window begins in this pass, or in a later one.
                memory.recent_mass.rows.pop(row, None)
            if stop > start:
                memory.recent_mass.add(row, late[i])
            if seen.prompt_left is not None and seen.prompt_left <= 0:
                memory.due.add(row)

    def ended(self, held: Held, memory: Importance) -> bool:
        return held.row in memory.due

    def of(self, held: Held, memory: Importance, edge: int) -> Tensor | None:
        return memory.score(held.row) if held.row in memory.overall_mass.rows else None

    def settled(self, held: Held, memory: Importance, over: bool) -> None:
        memory.due.discard(held.row)
        if not over:
            # When tokens are dropped next, these queries will not be among the last ones.
            memory.recent_mass.rows.pop(held.row, None)
