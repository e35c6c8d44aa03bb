"""Attention received from the last queries of a prompt in a few query heads of each layer, the same for all."""

from dataclasses import dataclass

from torch import Tensor

from kvote.errors import MethodError
from kvote.keep.observation import Observation
from kvote.keep.score.last_queries import LastQueries


@dataclass(frozen=True, kw_only=True)
class ChosenHeads(LastQueries):
    """``heads``: layers of the model, each with the query heads whose mean counts."""

    heads: tuple[tuple[int, tuple[int, ...]], ...]
    pooling: str = "avg"
    per_head: bool = False
    uneven = False

    def _votes(self, seen: Observation, start: int, stop: int) -> Tensor:
        heads = dict(self.heads).get(seen.layer)
        if heads is None:
            raise MethodError(f"The calibration says nothing of layer {seen.layer}; calibrate this model.")
        return seen.weights(start, stop)[:, list(heads)].sum(2).mean(1, keepdim=True)
