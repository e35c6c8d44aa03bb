"""Keeps what the last queries of a prompt look at, and those last tokens themselves."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from kvote import kernels
from kvote.errors import MethodError
from kvote.keep.budget import Budget
from kvote.keep.keeper import Held, Kept
from kvote.keep.mass import Mass
from kvote.keep.observation import Observation
from kvote.keep.policies import Plain
from kvote.numbers import check_flags, check_whole

_POOLS: dict[str, Callable[[Tensor, int, int, int], Tensor]] = {"avg": avg_pool1d, "max": max_pool1d}


@dataclass(frozen=True)
class KeepWindowVotes(Plain):
    """Parameters as in ``methods/snapkv.py``, which documents them."""

    budget: Budget
    window: int
    kernel: int
    pooling: str
    per_head: bool = True
    drops: bool = field(default=True, init=False)
    waits: bool = field(default=True, init=False)
    while_generating: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_whole(self, window=1, kernel=1)
        if self.kernel % 2 == 0:
            raise MethodError(f"kernel must be odd, so that a pooled vote stays at its token; got {self.kernel}.")
        if self.pooling not in _POOLS:
            raise MethodError(f"pooling must be 'avg' or 'max'; got {self.pooling!r}.")
        check_flags(self, "per_head")
        if self.budget.unit == "tokens" and self.budget.amount <= self.window:
            raise MethodError(
                f"budget must exceed the window of {self.window}, which always stays; got {self.budget.amount}."
            )

    def new_memory(self) -> Mass:
        return Mass()

    def observes(self, ahead: int | None) -> bool:
        return ahead is not None and ahead < self.window

    def observe(self, seen: Observation, memory: Mass) -> None:
        if seen.ahead is None:
            return
        end = seen.count + seen.ahead
        start, stop = max(0, end - self.window), min(seen.count, end)
        if start >= stop:
            return
        for row, mass in zip(seen.rows, self._votes(seen, start, stop), strict=True):
            if end >= self.window:
                memory.rows.pop(row, None)
            memory.add(row, mass)

    def _votes(self, seen: Observation, start: int, stop: int) -> Tensor:
        """Votes [b, h, n], or [b, heads, n] where query heads must be pooled one by one, before they are added up."""
        if self.pooling == "avg":
            mass = seen.mass(start, stop)
            return mass if self.per_head else mass.sum(dim=1, keepdim=True)
        groups = seen.lse.shape[1] // seen.segment.heads
        return torch.stack([seen.member(i).mass(start, stop) for i in range(groups)], dim=2).flatten(1, 2)

    def _pooled(self, votes: Tensor, heads: int) -> Tensor:
        """Votes pooled over neighbours, [h, n] or, where all key heads keep the same, [1, n]."""
        pooled = _POOLS[self.pooling](votes, self.kernel, 1, self.kernel // 2)
        if self.pooling == "avg":
            return pooled
        return pooled.reshape(heads if self.per_head else 1, -1, pooled.shape[1]).sum(dim=1)

    def survivors(self, held: Held, memory: Mass) -> Kept | None:
        if held.row not in memory.rows:
            return None
        # Votes serve once: tokens generated after the prompt stay until the next prompt votes anew.
        votes = memory.rows.pop(held.row)
        edge, chosen = held.length - self.window, max(held.budget, self.window) - self.window
        if edge <= chosen:
            return None
        pooled = self._pooled(votes[:, :edge], held.segment.heads)
        window = torch.arange(edge, held.length, device=votes.device).expand(len(pooled), -1)
        slots = torch.cat([kernels.top_k(pooled, chosen), window], dim=1) if chosen else window
        return Kept(slots if self.per_head else slots[0])
