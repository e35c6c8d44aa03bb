"""Whole numbers of tokens for layers that share a budget, in proportion to their preferences."""

from collections.abc import Sequence
from math import exp, isfinite


def even(total: int, count: int) -> list[int]:
    """``total`` in ``count`` parts that differ by one at most, the larger ones first."""
    return [total // count + (i < total % count) for i in range(count)]


def of_logs(logs: Sequence[float]) -> list[float]:
    """Preferences whose logarithms these are, relative to the largest; all the same where that is not finite."""
    top = max(logs)
    return [exp(log - top) for log in logs] if isfinite(top) else [1.0] * len(logs)


def shares(preferences: Sequence[float], total: int, caps: Sequence[int]) -> list[int]:
    """Tokens of each layer: its share of ``total``, at most ``caps[i]``. They add up to min(total, sum(caps)).

    The rules of arXiv 2503.12491: shares are truncated; what exceeds a cap is spread evenly over the layers below
    theirs, and so is then what truncation has left over. Preferences that add up to nothing, or that are not finite,
    count as equal.
    """
    caps = [max(0, cap) for cap in caps]
    weight = sum(preferences)
    if not isfinite(weight) or weight <= 0:
        preferences, weight = [1.0] * len(caps), float(len(caps))
    wanted = [int(preference / weight * total) for preference in preferences]
    given = [min(share, cap) for share, cap in zip(wanted, caps, strict=True)]
    _spread(given, sum(wanted) - sum(given), caps)
    _spread(given, total - sum(given), caps)
    return given


def _spread(given: list[int], rest: int, caps: Sequence[int]) -> None:
    """Adds ``rest`` evenly to those below their caps; again for what meets another cap, until all have theirs."""
    while rest > 0 and (open_ := [i for i, cap in enumerate(caps) if given[i] < cap]):
        for i, part in zip(open_, even(rest, len(open_)), strict=True):
            part = min(part, caps[i] - given[i])
            given[i] += part
            rest -= part
