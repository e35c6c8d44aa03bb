"""Mean and covariance of queries, as they were before rotation and as they will be after it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote.memory import storage_bytes
from kvote.rope import Rope


@dataclass(frozen=True)
class Gaussian:
    """Of ``count`` queries without rotation, up to slot ``stop``: their ``mean`` [heads, d] and the sum of products of
    their deviations from it (``spread`` [heads, d, d]), float32. ``scale``: of the model's logits."""

    stop: int
    count: int
    mean: Tensor
    spread: Tensor
    scale: float

    @classmethod
    def of(cls, queries: Tensor, stop: int, scale: float) -> "Gaussian":
        """The moments of queries [heads, n, d]."""
        mean = queries.mean(dim=1)
        apart = queries - mean[:, None]
        return cls(stop, queries.shape[1], mean, apart.transpose(1, 2) @ apart, scale)

    def __add__(self, other: "Gaussian") -> "Gaussian":
        # Second moments would cancel where means are large.
        count, apart = self.count + other.count, other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = apart[:, :, None] * apart[:, None] * (self.count * other.count / count)
        return Gaussian(other.stop, count, mean, self.spread + other.spread + between, self.scale)

    def future_moments(self, rope: Rope, first: int, positions: int) -> tuple[Tensor, Tensor]:
        """Mean and covariance under the mean of the rotations of ``positions`` positions from ``first`` on."""
        places = torch.arange(first, first + positions, device=self.mean.device)
        cos, sin = (part.mean(dim=-2) for part in rope.once(places[None]))
        rotated = rope.apply(self.mean[:, None], (cos, sin))[:, 0]
        half = rope.apply(self.spread / self.count, (cos, sin))
        return rotated, rope.apply(half.transpose(1, 2).contiguous(), (cos, sin))


@dataclass
class Gaussians:
    """By sequence: of the queries so far, after each of the last two passes, of which one may be taken back.

    Tensors are never changed in place, so sequences may share them.
    """

    rows: dict[int, tuple[Gaussian, ...]] = field(default_factory=dict)

    def add(self, row: int, new: Gaussian) -> None:
        before = self.rows.get(row, ())[-1:]
        self.rows[row] = (*before, before[0] + new) if before else (new,)

    def select(self, index: list[int]) -> None:
        self.rows = {i: self.rows[old] for i, old in enumerate(index) if old in self.rows}

    def keep(self, row: int, slots: Tensor) -> None:
        # Queries are of tokens that may be gone.
        pass

    def truncate(self, row: int, length: int) -> None:
        left = tuple(part for part in self.rows.pop(row, ()) if part.stop <= length)
        if left:
            self.rows[row] = left

    @property
    def nbytes(self) -> int:
        return storage_bytes(t for parts in self.rows.values() for part in parts for t in (part.mean, part.spread))
