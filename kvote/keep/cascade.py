"""Keeps what the last queries of a prompt look at and what they disagree about, more of it in layers whose attention is
spread and shifts; the shares of layers change while the prompt goes through them."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvote import kernels
from kvote.errors import MethodError
from kvote.keep.budget import Budget, check_burst, left
from kvote.keep.keeper import Held, Kept
from kvote.keep.observation import Observation
from kvote.keep.policies import Plain
from kvote.keep.shares import even, of_logs, shares
from kvote.keep.votes import Moments, Vote, Votes
from kvote.numbers import check_flags, check_whole, is_number
from kvote.store.pages import PAGE

# Float32 weights (16 MiB) that are held at a time.
_WEIGHTS_HELD = 1 << 22


@dataclass(frozen=True)
class KeepCascade(Plain):
    """Parameters as in ``methods/cake.py``, which documents them."""

    budget: Budget
    window: int
    gamma: float
    kernel: int
    tau1: float
    tau2: float
    per_head: bool = True
    evict_generated: bool = True
    burst: int | None = None
    drops: bool = field(default=True, init=False)
    waits: bool = field(default=True, init=False)
    cascades: bool = field(default=True, init=False)
    while_generating: bool = field(default=True, init=False)
    adds_up: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_whole(self, window=1, kernel=1)
        if self.kernel % 2 == 0:
            raise MethodError(f"kernel must be odd, so that a pooled value stays at its token; got {self.kernel}.")
        for name, least in (("gamma", 0), ("tau1", 1e-3), ("tau2", 1e-3)):
            value = getattr(self, name)
            if not is_number(value) or value < least:
                raise MethodError(f"{name} must be a finite number of at least {least}; got {value!r}.")
        check_flags(self, "per_head", "evict_generated")
        check_burst(self.burst)
        if self.budget.unit == "tokens" and self.budget.amount <= self.window:
            raise MethodError(
                f"budget must exceed the window of {self.window}, which always stays; got {self.budget.amount}."
            )
        # How many tokens may stay is settled with a prompt and holds for what is generated after it.
        for name in ("while_generating", "adds_up"):
            object.__setattr__(self, name, self.evict_generated)

    def new_memory(self) -> Votes:
        return Votes()

    def observes(self, ahead: int | None) -> bool:
        return self.evict_generated if ahead is None else ahead < self.window

    def observe(self, seen: Observation, memory: Votes) -> None:
        if seen.ahead is None:
            free = seen.first + seen.count - self.window
            if any(memory.limits.get(row, free) < free for row in seen.rows):
                for row, mass in zip(seen.rows, seen.mass(seen.count - 1), strict=True):
                    memory.latest[row] = mass if self.per_head else mass.sum(dim=0, keepdim=True)
            return
        end = seen.count + seen.ahead
        start, stop = max(0, end - self.window), min(seen.count, end)
        if start >= stop:
            return
        columns = max(0, seen.first + end - self.window)
        for row, part in zip(seen.rows, self._moments(seen, start, stop, columns), strict=True):
            before = memory.pending.pop(row, None)
            # Where the window begins in this pass, nothing before belongs to it; nor does what is left of a prompt
            # that ended elsewhere.
            if before is not None and end < self.window and before.mean.shape == part.mean.shape:
                part = before + part
            if seen.ahead > 0:
                memory.pending[row] = part
            else:
                memory.cast[row] = self._vote(part, columns, seen.segment.heads)

    def _moments(self, seen: Observation, start: int, stop: int, columns: int) -> list[Moments]:
        """Of each sequence, over its first ``columns`` tokens."""
        b, heads, _ = seen.lse.shape
        rows = max(1, _WEIGHTS_HELD // (b * heads * (seen.first + seen.count)))
        total: list[Moments] = []
        for a in range(start, stop, rows):
            weights = seen.weights(a, min(stop, a + rows))[..., :columns]
            parts = [Moments.of(each) for each in weights]
            total = [one + other for one, other in zip(total, parts, strict=True)] if total else parts
        return total

    def _vote(self, moments: Moments, columns: int, kv_heads: int) -> Vote:
        preference = _log(moments.entropy) / self.tau1 + _log(float(moments.variance.sum())) / self.tau2
        worth = moments.mean + self.gamma * moments.variance
        worth = worth.reshape(kv_heads, -1, columns).mean(dim=1) if columns else worth[:kv_heads]
        worth = worth if self.per_head else worth.mean(dim=0, keepdim=True)
        return Vote(preference, columns, self._pooled(worth))

    def _pooled(self, x: Tensor) -> Tensor:
        return avg_pool1d(x, self.kernel, 1, self.kernel // 2) if x.shape[-1] else x

    def survivors(self, held: Held, memory: Votes) -> Kept | None:
        # The prompt is over, also for a sequence that had no token in its last pass.
        memory.pending.pop(held.row, None)
        latest, worth = memory.latest.pop(held.row, None), memory.worth(held.row)
        if worth is not None:
            return self._best(worth, self._share(held, memory), held.length)
        edge = held.length - self.window
        if latest is None or edge <= memory.limits.get(held.row, edge):
            return None
        return self._best(self._pooled(latest[:, :edge]), left(memory.limits[held.row], self.burst), held.length)

    def _best(self, worth: Tensor, count: int, length: int) -> Kept | None:
        """The ``count`` most worthy of the first tokens, and all behind them."""
        n = worth.shape[-1]
        if n <= count:
            return None
        rest = torch.arange(n, length, device=worth.device).expand(len(worth), -1)
        slots = torch.cat([kernels.top_k(worth, count), rest], dim=1) if count else rest
        return Kept(slots if self.per_head else slots[0])

    def _share(self, held: Held, memory: Votes) -> int:
        """Tokens besides the window that this layer may hold, by the preferences of the layers observed so far."""
        row, layers = held.row, len(held.memories)
        # Of bytes, layers that differ in length need up to a page more each.
        budget = held.budget - PAGE if self.budget.unit == "bytes" else held.budget
        total = max(0, budget - self.window) * layers
        votes = [seen.cast[row] for seen in held.memories[: held.observed]]
        given = shares(of_logs([vote.preference for vote in votes]), total, [vote.columns for vote in votes])
        share = given[held.layer]
        if held.observed == layers:
            memory.cast[row] = replace(votes[held.layer], worth=None)
            if self.evict_generated:
                # What a short prompt leaves of the budget is for what is generated.
                memory.limits[row] = share + even(total - sum(given), layers)[held.layer]
        return share


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
