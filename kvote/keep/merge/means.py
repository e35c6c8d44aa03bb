"""The mean of what is dropped goes on answering for all of it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote.errors import MethodError
from kvote.keep.budget import Budget
from kvote.keep.evict import Cut, Evict
from kvote.keep.keeper import Held
from kvote.keep.score.recency import Recency
from kvote.kernels import reference
from kvote.memory import storage_bytes
from kvote.needs import Keys, Needs
from kvote.store.segment import Scaling
from kvote.tokens import Queries


@dataclass(frozen=True)
class Mean:
    """``count`` tokens as one: the means of their keys [h, d], as the model rotated them, and of their values [h, dv].

    In float32: a mean of many tokens would not move any more in half precision.
    """

    count: int
    key: Tensor
    value: Tensor

    def joined(self, other: "Mean") -> "Mean":
        """The mean of both, every token with the same weight."""
        count = self.count + other.count
        share = other.count / count
        return Mean(count, torch.lerp(self.key, other.key, share), torch.lerp(self.value, other.value, share))


@dataclass
class Means:
    """By sequence: the mean of what it dropped; sequences that dropped nothing have none."""

    rows: dict[int, Mean] = field(default_factory=dict)

    def fold(self, row: int, key: Tensor, value: Tensor) -> None:
        """Adds dropped tokens, ``key`` [h, n, d] and ``value`` [h, n, dv]."""
        new = Mean(key.shape[1], key.float().mean(dim=1), value.float().mean(dim=1))
        self.rows[row] = self.rows[row].joined(new) if row in self.rows else new

    def attend(self, queries: Tensor, rows: list[int], scaling: Scaling) -> tuple[Tensor, Tensor] | None:
        """Attention over the means, each with the log of its number of tokens added to its logit; None without any."""
        found = [self.rows[row] for row in rows if row in self.rows]
        if not found:
            return None
        # A sequence that dropped nothing has a mean of no tokens, whose log-sum-exp is -inf.
        none = Mean(0, torch.zeros_like(found[0].key), torch.zeros_like(found[0].value))
        each = [self.rows.get(row, none) for row in rows]
        key, value = (torch.stack(parts)[:, :, None] for parts in zip(*((m.key, m.value) for m in each), strict=True))
        counts = torch.tensor([float(mean.count) for mean in each], device=key.device).log()
        bias = counts[:, None, None].expand(-1, key.shape[1], -1)
        return reference.attend(queries, key, value, scale=scaling.scale, softcap=scaling.softcap, bias=bias)

    def select(self, index: list[int]) -> None:
        self.rows = {i: self.rows[old] for i, old in enumerate(index) if old in self.rows}

    def keep(self, row: int, slots: Tensor) -> None:
        """Nothing here is about tokens that are held."""

    def truncate(self, row: int, length: int) -> None:
        """No rollback reaches behind a drop."""

    @property
    def nbytes(self) -> int:
        return storage_bytes(part for mean in self.rows.values() for part in (mean.key, mean.value))


@dataclass(frozen=True)
class IntoMean:
    """All that goes becomes one token, which stands for it. It lies between sinks and recent tokens, so this is for
    windows that leave nothing to be chosen in between."""

    # What has gone into a mean stays there: a crop must not forget it.
    adds_up: bool = True
    # The mean of keys that stand at position 0 is another one.
    needs = Needs(keys=Keys.ROTATED)

    def new_memory(self) -> Means:
        return Means()

    def merged(self, held: Held, memory: Means, cut: Cut) -> None:
        assert cut.chosen == 0
        key, value = held.segment.decode([held.row], cut.sinks, held.length - (cut.slots.shape[1] - cut.sinks))
        memory.fold(held.row, key[0], value[0])

    def slotless_attention(
        self, queries: Queries, rows: list[int], scaling: Scaling, memory: Means
    ) -> tuple[Tensor, Tensor] | None:
        return memory.attend(queries.rotated, rows, scaling)


def recent_and_mean(budget: Budget, sinks: int, compensation: bool = True, burst: int | None = None) -> Evict:
    """The first ``sinks`` tokens and the most recent ones, together as many as ``budget`` says; while generating, up to
    ``burst`` - 1 fewer. ``compensation``: the mean of what is dropped stays and stands for all of it."""
    if not isinstance(compensation, bool):
        raise MethodError(f"compensation must be True or False; got {compensation!r}.")
    merge = IntoMean() if compensation else None
    return Evict(Recency(), budget, window=1.0, sinks=sinks, burst=burst, merge=merge)
