"""Later tokens are worth more."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvote.keep.keeper import Held
from kvote.keep.score.score import Score


@dataclass(frozen=True, kw_only=True)
class Recency(Score):
    """The same for all heads and layers."""

    per_head: bool = False
    per_layer = False

    def of(self, held: Held, memory: None, edge: int) -> Tensor:
        return torch.arange(edge, dtype=torch.float32)[None]
