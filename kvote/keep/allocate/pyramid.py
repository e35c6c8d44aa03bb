"""Shallow layers hold more than deep ones, in equal steps."""

from dataclasses import dataclass
from typing import Any

from kvote.keep.keeper import Held
from kvote.numbers import check_whole
from kvote.store.pages import PAGE


@dataclass(frozen=True)
class Pyramid:
    """The deepest layer holds 1 / ``beta`` of the mean, the first twice the mean less that; all hold the mean of texts
    that are shorter than twice it. No layer holds more than there is before the last ``window`` tokens, and what it
    leaves is for the deep ones."""

    beta: int
    window: int
    cascades: bool = False
    per_layer: bool = True

    def __post_init__(self) -> None:
        check_whole(self, beta=1)

    def margin(self, layers: int) -> int:
        # Steps are rounded down: the mean is up to half a token per layer higher.
        return PAGE + layers // 2

    def tokens(self, held: Held, memory: Any, mean: int) -> int:
        # Of the whole text, which is the same for all layers, however much of it each of them holds.
        if held.layers == 1 or held.seen < 2 * mean:
            return mean
        least = mean // self.beta
        most = min(2 * mean - least, held.seen - self.window)
        step = (most - (2 * mean - most)) // (held.layers - 1)
        return most - held.layer * step
