"""Keeps the tokens that have received the most attention so far, and the most recent ones."""

from dataclasses import dataclass, field

import torch

from kvote import kernels
from kvote.errors import MethodError
from kvote.keep.budget import Budget, check_burst, left, whole
from kvote.keep.keeper import Held, Kept
from kvote.keep.mass import Mass
from kvote.keep.observation import Observation
from kvote.keep.policies import Plain
from kvote.numbers import check_flags


@dataclass(frozen=True)
class KeepHeavyHitters(Plain):
    """Parameters as in ``methods/h2o.py``, which documents them."""

    budget: Budget
    recent: float
    per_head: bool = True
    burst: int | None = None
    drops: bool = field(default=True, init=False)
    waits: bool = field(default=True, init=False)
    adds_up: bool = field(default=True, init=False)
    token_bytes: int = field(default=4, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.recent, int | float) or isinstance(self.recent, bool) or not 0 < self.recent <= 1:
            raise MethodError(f"recent must be a share of the budget, above 0 and at most 1; got {self.recent!r}.")
        check_flags(self, "per_head")
        check_burst(self.burst)

    def new_memory(self) -> Mass:
        return Mass()

    def observes(self, ahead: int | None) -> bool:
        return True

    def observe(self, seen: Observation, memory: Mass) -> None:
        for row, mass in zip(seen.rows, seen.mass(), strict=True):
            memory.add(row, mass if self.per_head else mass.sum(dim=0, keepdim=True))

    def survivors(self, held: Held, memory: Mass) -> Kept | None:
        if held.length <= held.budget:
            return None
        stays = left(held.budget, self.burst) if held.generated else held.budget
        heavy = whole(stays * (1 - self.recent))
        edge = held.length - (stays - heavy)
        mass = memory.rows[held.row]
        recent = torch.arange(edge, held.length, device=mass.device).expand(len(mass), -1)
        slots = torch.cat([kernels.top_k(mass[:, :edge], heavy), recent], dim=1) if heavy else recent
        return Kept(slots if self.per_head else slots[0])
