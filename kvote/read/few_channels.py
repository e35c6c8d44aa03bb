"""Tokens chosen by the channels in which a query is large; the mean of all values stands for the others."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kvote import kernels
from kvote.errors import MethodError
from kvote.index.value_sums import NAME, ValueSumsIndex
from kvote.needs import Needs
from kvote.numbers import check_whole
from kvote.read.per_head import LISTS, ReadsLists
from kvote.read.reader import Reading, everything
from kvote.tokens import Span, TokenSet, Unread

# Below this share of a query in the channels chosen, they say nothing about it.
_LEAST = 1e-12


@dataclass(frozen=True)
class FewChannels(ReadsLists):
    """Parameters as in ``methods/sparq.py``, which documents them."""

    rank: int
    top_k: int
    local: int

    def __post_init__(self) -> None:
        check_whole(self, rank=1, top_k=0, local=0)
        if self.local > self.top_k:
            raise MethodError(f"local must be at most top_k ({self.top_k}), of which it is a part; got {self.local}.")

    @cached_property
    def needs(self) -> Needs:
        return replace(LISTS, indexes=(ValueSumsIndex(),))

    def read(self, reading: Reading) -> Iterator[Span]:
        n, sums = reading.first + reading.count, reading.segment.indexes.get(NAME)
        if sums is None or not reading.decode or n <= self.top_k + 1:
            yield everything(reading)
            return
        h, logits = reading.segment.heads, self._logits(reading, n)
        b, heads = logits.shape[:2]
        # Query heads of one key head choose together.
        votes = logits.reshape(b, h, -1, 1, n).sum(2)
        votes[..., n - 1 - self.local :] = float("inf")
        index = kernels.top_k(votes, self.top_k + 1).repeat_interleave(heads // h, dim=1)
        read = logits.gather(3, index).logsumexp(3)
        unread_mass = logits.scatter(3, index, float("-inf")).logsumexp(3)
        mean = sums.mean(reading.rows, n).repeat_interleave(heads // h, dim=1)[:, :, None]
        reading.activity.selections += len(reading.rows)
        reading.activity.tokens_read = index.shape[-1]
        yield Span(0, 1, [TokenSet(index, causal=False)], Unread(mean, unread_mass - read))

    def _logits(self, reading: Reading, n: int) -> Tensor:
        """The logits [b, heads, 1, n] that enter the softmax, estimated from the ``rank`` channels in which the query
        heads of a key head are largest together."""
        query = reading.queries.rotated
        b, _, _, d = query.shape
        size = query.float().abs().reshape(b, reading.segment.heads, -1, 1, d)
        channels = size.sum(2, keepdim=True).topk(min(self.rank, d), dim=-1).indices
        chosen = torch.zeros_like(size[:, :, :1]).scatter(-1, channels, 1.0).expand_as(size)
        share = ((size * chosen).sum(-1) / size.sum(-1).clamp(min=_LEAST)).clamp(min=_LEAST)
        # A query that is zero elsewhere meets the keys in these channels alone.
        products = reading.segment.scores(query * chosen.flatten(1, 2).to(query.dtype), reading.rows, 0, n)
        # The fewer of a query's channels are seen, the larger the products of all would be.
        return reading.scaled(products.transpose(1, 2) / share.flatten(1, 2)[..., None].sqrt())
