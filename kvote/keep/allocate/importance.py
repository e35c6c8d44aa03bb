"""Layers divide a budget by importances that were measured beforehand, within bounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from kvote.keep.keeper import Held
from kvote.numbers import check_whole
from kvote.store.pages import PAGE


@dataclass(frozen=True)
class ByImportance:
    """Every layer has ``least`` tokens and a share of the rest by its importance, up to ``most`` times the mean.
    ``always``: tokens of each that stay in any case, and are among these."""

    importance: tuple[float, ...]
    always: int
    least: int
    most: int
    cascades: bool = False
    per_layer: bool = True

    def __post_init__(self) -> None:
        check_whole(self, least=1, most=1)

    def margin(self, layers: int) -> int:
        # Layers that differ in length need up to a page more each.
        return PAGE

    def tokens(self, held: Held, memory: Any, mean: int) -> int:
        given = capacities(self.importance, mean + self.always, self.least, self.most)
        return max(0, given[held.layer] - self.always)


@lru_cache(maxsize=64)
def capacities(importance: tuple[float, ...], mean: int, least: int, most: int) -> Sequence[int]:
    """Tokens of each layer, of ``mean`` on average: the published rule. What rounding leaves goes to the most important
    first, and what it takes too much comes from the least important, one token each, within the bounds."""
    layers, total = len(importance), mean * len(importance)
    low, high = min(least, mean), most * mean
    weight = sum(importance) or 1.0
    given = [min(high, max(low, low + round(each / weight * (total - low * layers)))) for each in importance]
    order = sorted(range(layers), key=lambda i: -importance[i])
    while (rest := total - sum(given)) != 0:
        step, bound = (1, high) if rest > 0 else (-1, low)
        moved = [i for i in (order if rest > 0 else order[::-1]) if given[i] != bound][: abs(rest)]
        if not moved:
            break
        for i in moved:
            given[i] += step
    return given
