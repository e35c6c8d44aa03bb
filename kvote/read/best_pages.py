"""Whole pages of neighbouring tokens, those with the highest bounds on their scores."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from kvote import kernels
from kvote.errors import MethodError
from kvote.index.bounds import NAME, BoundsIndex
from kvote.needs import ANYWHERE, Needs, ReaderOffers
from kvote.numbers import check_whole
from kvote.read.per_head import LISTS, ReadsLists, span_of
from kvote.read.reader import Reading, everything
from kvote.store.pages import PAGE
from kvote.tokens import Span


@dataclass(frozen=True)
class BestPages(ReadsLists):
    """Parameters as in ``methods/quest.py``, which documents them."""

    token_budget: int
    page: int
    dense_layers: int

    def __post_init__(self) -> None:
        check_whole(self, token_budget=1, page=1, dense_layers=0)
        if PAGE % self.page:
            raise MethodError(f"page must divide {PAGE} tokens, so be 1, 2, 4, 8, 16, 32 or 64; got {self.page}.")

    @cached_property
    def needs(self) -> Needs:
        return replace(LISTS, indexes=(BoundsIndex(self.page, self.dense_layers),))

    offers = ReaderOffers(cuts=ANYWHERE)

    def read(self, reading: Reading) -> Iterator[Span]:
        n, bounds = reading.first + reading.count, reading.segment.indexes.get(NAME)
        last, count = (n - 1) // self.page, max(3, self.token_budget // self.page)
        if bounds is None or not reading.decode or n <= self.token_budget or last < count:
            yield everything(reading)
            return
        reading.activity.selections += len(reading.rows)
        scores = bounds.scores(reading.queries.rotated, reading.rows, last * self.page)
        best = kernels.top_k(scores, count - 1)[..., None] * self.page
        tokens = (best + torch.arange(self.page, device=best.device)).flatten(3)
        newest = torch.arange(last * self.page, n, device=best.device).expand(*tokens.shape[:3], -1)
        yield span_of(reading, torch.cat([tokens, newest], dim=3))
