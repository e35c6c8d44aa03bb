"""Tokens drawn at random, but for those with the largest values: they stay, and the rest of the budget is drawn."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvote.errors import MethodError
from kvote.keep.budget import whole
from kvote.keep.keeper import Held
from kvote.keep.score.random_score import EndedPrompts, RandomScore
from kvote.numbers import is_number


@dataclass(frozen=True, kw_only=True)
class GuardedLot(RandomScore):
    """A ``share`` of the budget is for the tokens whose values have the largest Euclidean norms, each key head's own;
    the others have lots as in ``RandomScore``."""

    share: float
    per_head: bool = True
    per_layer = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.share) or not 0 < self.share <= 1:
            raise MethodError(f"protect must be a share of the budget, from 0 to 1; got {self.share!r}.")

    def of(self, held: Held, memory: EndedPrompts, edge: int) -> Tensor:
        norms = held.each(lambda key, value: value.norm(dim=-1), edge)
        places = held.segment.positions(held.row)
        random_worth = torch.stack([self.random_worth(at[:edge].cpu()) for at in places]).to(norms.device)
        guarded = min(whole(self.share * held.budget), norms.shape[1])
        return random_worth.expand_as(norms).scatter_add(1, norms.topk(guarded, dim=1).indices, torch.ones_like(norms))
