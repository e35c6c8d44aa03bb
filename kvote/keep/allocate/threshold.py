"""Layers keep what is worth enough, however many tokens that are, up to an even share of the budget."""

from dataclasses import dataclass
from functools import cached_property

from kvote.errors import MethodError
from kvote.keep.keeper import Held
from kvote.keep.score.any_query import AnyQuery, Most
from kvote.numbers import is_number


@dataclass(frozen=True)
class Threshold:
    """For ``AnyQuery``, each layer once: when it has been through a prompt. Tokens worth less than ``least`` go even
    where the budget has room."""

    least: float
    score: AnyQuery
    per_layer: bool = True

    def __post_init__(self) -> None:
        if not is_number(self.least) or not 0 <= self.least < 1:
            raise MethodError(f"threshold must be a share of attention, from 0 to below 1; got {self.least!r}.")

    @cached_property
    def cascades(self) -> bool:
        # A layer is shown what the first of its group has seen.
        return self.score.layers_alike > 1

    def margin(self, layers: int) -> int:
        return 0

    def tokens(self, held: Held, memory: Most, mean: int) -> int | None:
        if held.observed != held.layer + 1:
            return None
        worth = self.score.of(held, memory, held.length)[0, : held.length - 1]
        return min(mean, int((worth >= self.least).sum()))
