"""How heads agree on tokens: from the scores of one selection to one vote per candidate (TokenSelect, section 3.3)."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvote import kernels
from kvote.errors import MethodError

Vote = Callable[[Tensor, int], Tensor]


def soft_vote(logits: Tensor, top_k: int) -> Tensor:
    """Each head spreads one vote over the candidates by its softmax: no head can outshout the others."""
    return kernels.soft_votes(logits)


def head_vote(logits: Tensor, top_k: int) -> Tensor:
    """Each head gives one vote to each of its own ``top_k`` tokens (the paper's ablation)."""
    winners = logits.topk(top_k, dim=-1).indices
    return torch.zeros_like(logits).scatter_(-1, winners, 1.0).sum(dim=-2)


def logit_sum(logits: Tensor, top_k: int) -> Tensor:
    """Logits summed over heads (the paper's ablation, "top-k"): one loud head decides."""
    return logits.sum(dim=-2)


VOTES: dict[str, Vote] = {"soft_vote": soft_vote, "head_vote": head_vote, "logit_sum": logit_sum}


def vote_named(name: str) -> Vote:
    """The vote called ``name``; raises MethodError for an unknown one."""
    if name not in VOTES:
        raise MethodError(f"selection must be one of {', '.join(VOTES)}; got {name!r}.")
    return VOTES[name]
