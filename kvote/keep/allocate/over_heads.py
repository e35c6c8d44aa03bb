"""Allocation over heads: how many tokens each key head of a layer keeps, decided by what its tokens are worth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvote import kernels
from kvote.errors import MethodError
from kvote.keep.keeper import Held, Kept
from kvote.numbers import is_number


class OverHeads(Protocol):
    """Divides what a layer may hold over its key heads."""

    def tokens(self, worth: Sequence[Tensor], mean: int) -> list[int]:
        """Tokens that each key head keeps of those that ``worth`` [n] is given of, ``mean`` on average."""
        ...


@dataclass(frozen=True)
class CompetingHeads:
    """A key head keeps the tokens that it has among the best of all heads together. The share ``safeguard`` of the
    mean is each head's own, and what it wins is scaled down by as much, so that no head is left without tokens."""

    safeguard: float

    def __post_init__(self) -> None:
        if not is_number(self.safeguard) or not 0 <= self.safeguard <= 1:
            raise MethodError(f"safeguard must be a share from 0 to 1; got {self.safeguard!r}.")

    def tokens(self, worth: Sequence[Tensor], mean: int) -> list[int]:
        together = torch.cat(list(worth))
        most = min(len(worth) * mean, len(together))
        if not most:
            return [0] * len(worth)
        best = kernels.top_k(together[None], most)[0]
        sizes = torch.tensor([len(own) for own in worth], device=best.device)
        won = torch.bucketize(best, sizes.cumsum(0), right=True).bincount(minlength=len(worth))
        return torch.round(won * (1 - self.safeguard) + int(mean * self.safeguard)).int().tolist()


def evict_per_head(worth: Tensor, held: Held, over: OverHeads, edge: int, sinks: int, mean: int) -> Kept | None:
    """The tokens that each key head keeps by its own ``worth`` [h, n]: the first ``sinks``, those from ``edge`` on, and
    between them the best, as many as ``over`` allots to it, ``mean`` on average. None: all of them."""
    edge = min(edge, worth.shape[1])
    firsts = [min(edge, held.length - lane + sinks) for lane in held.lanes]
    own = [worth[head, first:edge] for head, first in enumerate(firsts)]
    if sum(map(len, own)) <= mean * len(own):
        return None
    counts = [min(count, len(part)) for count, part in zip(over.tokens(own, mean), own, strict=True)]
    most, rows = max(counts), []
    for first, part, count in zip(firsts, own, counts, strict=True):
        best = kernels.top_k(part[None], count)[0] + first if count else part.new_empty(0, dtype=torch.int64)
        places = (torch.arange(first - sinks, first), best, torch.arange(edge, held.length))
        kept = torch.cat([part.to(best.device) for part in places])
        rows.append(torch.nn.functional.pad(kept, (most - count, 0), value=-1))
    return Kept(torch.stack(rows))
