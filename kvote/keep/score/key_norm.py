"""Norms of keys: a small key is often one that much attention falls on."""

from dataclasses import dataclass

from torch import Tensor

from kvote.keep.keeper import Held
from kvote.keep.score.score import Score


@dataclass(frozen=True, kw_only=True)
class KeyNorm(Score):
    """The smaller the Euclidean norm of its key, which no rotation changes, the more a token is worth."""

    uneven = True

    def of(self, held: Held, memory: None, edge: int) -> Tensor:
        return -held.each(lambda key, value: key.norm(dim=-1), edge)
