"""Attention received from all queries so far."""

from dataclasses import dataclass

from torch import Tensor

from kvote.keep.keeper import Held
from kvote.keep.observation import Observation
from kvote.keep.score.mass import Mass
from kvote.keep.score.score import Score


@dataclass(frozen=True, kw_only=True)
class AttentionReceived(Score):
    """Added up for as long as a token is held, its own query included."""

    adds_up = True
    token_bytes = 4
    uneven = True

    def new_memory(self) -> Mass:
        return Mass()

    def observes(self, prompt_left: int | None) -> bool:
        return True

    def observe(self, seen: Observation, memory: Mass) -> None:
        for row, mass in zip(seen.rows, self.shared(seen.mass()), strict=True):
            memory.add(row, mass)

    def of(self, held: Held, memory: Mass, edge: int) -> Tensor:
        return memory.rows[held.row]
