"""Means with bootstrap intervals, and differences between methods that are paired by sample."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_DRAWS, _SEED, _SHARE = 2_000, 0, 95.0


@dataclass(frozen=True)
class Interval:
    """A mean of ``count`` samples, and where it lies in 95 of 100 draws with replacement."""

    mean: float
    low: float
    high: float
    count: int


def interval(values: Sequence[float]) -> Interval:
    """Raises ValueError without values; of one value nothing is known but itself."""
    held = np.asarray(values, dtype=float)
    if not len(held):
        raise ValueError("An interval needs values.")
    draws = np.random.default_rng(_SEED).integers(0, len(held), (_DRAWS, len(held)))
    means = held[draws].mean(axis=1)
    edge = (100 - _SHARE) / 2
    low, high = np.percentile(means, (edge, 100 - edge))
    return Interval(float(held.mean()), float(low), float(high), len(held))


def difference(one: dict[str, float], other: dict[str, float]) -> Interval | None:
    """``one`` less ``other`` over the samples that both have, by key; None if there are none."""
    common = sorted(one.keys() & other.keys())
    return interval([one[key] - other[key] for key in common]) if common else None
