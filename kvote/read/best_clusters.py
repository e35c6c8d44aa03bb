"""Clusters of neighbouring tokens, chosen at two levels by a score that is linear in the query; layers share them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kvote import kernels
from kvote.errors import MethodError
from kvote.index.bounds import NAME, BoundsIndex
from kvote.needs import Needs
from kvote.numbers import check_whole, is_number
from kvote.read.per_head import LISTS, ReadsLists, span_of
from kvote.read.persistent import ChosenTokens
from kvote.read.reader import Reading, everything
from kvote.store.pages import PAGE
from kvote.tokens import Span


@dataclass(frozen=True)
class BestClusters(ReadsLists):
    """Parameters as in ``methods/mpcache.py``, which documents them."""

    coarse: float
    fine: float
    alpha: float
    cluster: int
    share: int

    def __post_init__(self) -> None:
        check_whole(self, cluster=1, share=1)
        if PAGE % self.cluster:
            raise MethodError(f"cluster must divide {PAGE} tokens, so be 1, 2, 4, 8, 16, 32 or 64; got {self.cluster}.")
        for name in ("coarse", "fine", "alpha"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise MethodError(f"{name} must be a number from 0 to 1; got {value!r}.")

    @cached_property
    def needs(self) -> Needs:
        return replace(LISTS, indexes=(BoundsIndex(self.cluster),), layers_alike=self.share)

    def new_memory(self) -> ChosenTokens:
        return ChosenTokens()

    def read(self, reading: Reading) -> Iterator[Span]:
        n, bounds = reading.first + reading.count, reading.segment.indexes.get(NAME)
        if bounds is None or not reading.decode or self.counts(n)[1] >= -(-n // self.cluster):
            yield everything(reading)
            return
        prompt_left = reading.number % self.share
        chosen = reading.memories[reading.number - prompt_left] if reading.memories else reading.memory
        assert isinstance(chosen, ChosenTokens)
        if prompt_left == 0:
            low, high = (each.float() for each in bounds.of(reading.rows, n))
            best = self.chosen(reading.queries.rotated.float(), low, high, n)[..., None] * self.cluster
            tokens = (best + torch.arange(self.cluster, device=best.device)).flatten(3)
            # Only the last cluster may be partly filled, and is then among those chosen.
            tokens = tokens[..., : tokens.shape[-1] - -n % self.cluster]
            chosen.index.update(zip(reading.rows, tokens, strict=True))
            reading.activity.selections += len(reading.rows)
        else:
            reading.activity.reused += len(reading.rows)
        yield span_of(reading, torch.stack([chosen.index[row] for row in reading.rows]))

    def counts(self, n: int) -> tuple[int, int]:
        """Clusters that are chosen of ``n`` tokens, of twice the size and then of them."""
        clusters = -(-n // self.cluster)
        pairs, forced = -(-clusters // 2), 1 + self._ends_within(n)
        coarse = min(pairs, int(pairs * self.coarse) + forced)
        # Where the last pair has one member, it is always chosen.
        return coarse, min(2 * coarse - clusters % 2, int(clusters * self.fine) + forced)

    def _ends_within(self, n: int) -> bool:
        """Whether the last pair of clusters is not full."""
        return n % (2 * self.cluster) > 0

    def chosen(self, query: Tensor, low: Tensor, high: Tensor, n: int) -> Tensor:
        """The clusters [b, heads, 1, c] of ``n`` tokens that ``query`` [b, heads, 1, d] reads, ascending, by the
        smallest and largest number ``low`` and ``high`` [b, h, clusters, d] in each channel of their keys."""
        coarse, fine = self.counts(n)
        clusters = low.shape[2]
        last = torch.arange(clusters + clusters % 2, device=low.device).clamp(max=clusters - 1)
        b, h, _, d = low.shape
        lowest, highest = (each[:, :, last].view(b, h, -1, 2, d) for each in (low, high))
        wide = self.similar(query, lowest.amin(3), highest.amax(3))
        pairs = self._best(wide, coarse, n)
        children = (pairs[..., None] * 2 + torch.arange(2, device=pairs.device)).flatten(3)
        narrow = self.similar(query, low, high)
        # What is in no pair chosen is not compared.
        scores = narrow.gather(3, children.clamp(max=clusters - 1)).masked_fill(children >= clusters, float("-inf"))
        scores = scores.masked_fill(children == 0, float("inf"))
        if self._ends_within(n):
            scores = scores.masked_fill(children == clusters - 1, float("inf"))
        return children.gather(3, kernels.top_k(scores, fine))

    def _best(self, scores: Tensor, count: int, n: int) -> Tensor:
        """The first of all, the last if that is not full, and then those of the largest ``scores`` [b, heads, 1, m]."""
        scores = scores.clone()
        scores[..., 0] = float("inf")
        if self._ends_within(n):
            scores[..., -1] = float("inf")
        return kernels.top_k(scores, count)

    def similar(self, query: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Scores [b, heads, 1, m] of ``query`` [b, heads, 1, d] with ``low`` and ``high`` [b, h, m, d]: its product
        with a mix of both. Unlike a bound, it needs no comparison, and may be below what a token has."""
        mixed = self.alpha * high + (1 - self.alpha) * low
        b, h, m, d = mixed.shape
        return (query.reshape(b, h, -1, d) @ mixed.mT).reshape(b, -1, 1, m)
