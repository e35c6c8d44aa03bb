"""Allocation: how a budget is divided over layers."""

from dataclasses import dataclass
from typing import Any, Protocol

from kvote.keep.keeper import Held


class Allocation(Protocol):
    """``cascades``: what is observed in a layer changes what earlier layers may hold. ``per_layer``: layers may hold
    different numbers of tokens."""

    @property
    def cascades(self) -> bool: ...
    @property
    def per_layer(self) -> bool: ...

    def margin(self, layers: int) -> int:
        """Tokens of a layer by which the mean over ``layers`` may be above what is asked for, in whole pages."""
        ...

    def tokens(self, held: Held, memory: Any, mean: int) -> int | None:
        """Tokens that this layer may hold besides those that always stay, where layers hold ``mean`` on average; None:
        all."""
        ...


@dataclass(frozen=True)
class Even:
    """Every layer holds the same number of tokens."""

    cascades: bool = False
    per_layer: bool = False

    def margin(self, layers: int) -> int:
        return 0

    def tokens(self, held: Held, memory: Any, mean: int) -> int:
        return mean
