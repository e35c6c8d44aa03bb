"""Votes: what the last queries of a prompt say about a layer, and how that is added up pass by pass."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvote.memory import storage_bytes

_TINY = 1e-10


@dataclass(frozen=True)
class Moments:
    """Statistics of attention [heads, queries, n] over its queries: their ``count``, ``mean`` and sum of squared
    deviations (``spread``), each float32 [heads, n], and the ``entropy`` of all together, not renormalised."""

    count: int
    mean: Tensor
    spread: Tensor
    entropy: float

    @classmethod
    def of(cls, weights: Tensor) -> "Moments":
        """The moments of weights [heads, queries, n]."""
        mean = weights.mean(dim=1)
        spread = (weights - mean[:, None]).square_().sum(dim=1)
        return cls(weights.shape[1], mean, spread, -float((weights * torch.log(weights + _TINY)).sum()))

    def __add__(self, other: "Moments") -> "Moments":
        # Sums of squares would cancel: weights of a long prompt are about 1e-6, and their variance less than 1e-12.
        count, apart = self.count + other.count, other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        spread = self.spread + other.spread + apart.square() * (self.count * other.count / count)
        return Moments(count, mean, spread, self.entropy + other.entropy)

    @property
    def variance(self) -> Tensor:
        """Unbiased, [heads, n]; 0 of a single query."""
        return self.spread / max(1, self.count - 1)


@dataclass(frozen=True)
class Vote:
    """On a prompt of which the first ``columns`` tokens may be dropped: how much of a budget the layer should have
    (``preference``, a logarithm), and what each of these tokens still held is worth, float32 [h, n] or [1, n], None
    once settled."""

    preference: float
    columns: int
    worth: Tensor | None


@dataclass
class Votes:
    """By sequence: the ``pending`` part of a vote, the ``cast`` ones, how many tokens besides the window may stay while
    generating (``limits``), and the attention [h, n] that the latest generated token paid (``latest``).

    Tensors are never changed in place, so sequences may share them.
    """

    pending: dict[int, Moments] = field(default_factory=dict)
    cast: dict[int, Vote] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)
    latest: dict[int, Tensor] = field(default_factory=dict)

    def worth(self, row: int) -> Tensor | None:
        """The worth of the tokens of a sequence whose vote has not been settled yet."""
        return self.cast[row].worth if row in self.cast else None

    def settle(self, row: int) -> None:
        """Ends the vote on a sequence; its preference remains."""
        if row in self.cast:
            self.cast[row] = replace(self.cast[row], worth=None)

    def select(self, index: list[int]) -> None:
        self.pending = {i: self.pending[old] for i, old in enumerate(index) if old in self.pending}
        self.cast = {i: self.cast[old] for i, old in enumerate(index) if old in self.cast}
        self.limits = {i: self.limits[old] for i, old in enumerate(index) if old in self.limits}
        self.latest = {i: self.latest[old] for i, old in enumerate(index) if old in self.latest}

    def keep(self, row: int, slots: Tensor) -> None:
        self.latest.pop(row, None)
        worth = self.worth(row)
        if worth is not None:
            slots = slots.to(worth.device).expand(worth.shape[0], -1)
            # Every head keeps as many of the tokens that were voted on.
            count = int((slots[0] < worth.shape[1]).sum())
            self.cast[row] = replace(self.cast[row], worth=worth.gather(1, slots[:, :count]))

    def truncate(self, row: int, length: int) -> None:
        # A rollback ends the prompt whose vote this was a part of.
        self.pending.pop(row, None)
        if row in self.latest and self.latest[row].shape[1] > length:
            # Paid by a token that is gone.
            del self.latest[row]
        worth = self.worth(row)
        if worth is not None:
            self.cast[row] = replace(self.cast[row], worth=worth[:, :length].clone())

    @property
    def nbytes(self) -> int:
        tensors = [vote.worth for vote in self.cast.values() if vote.worth is not None]
        tensors += [*self.latest.values(), *(t for part in self.pending.values() for t in (part.mean, part.spread))]
        return storage_bytes(tensors)
