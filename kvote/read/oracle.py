"""The tokens with the most true attention: no selection of the same size has more attention mass."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvote.needs import ANYWHERE, ReaderOffers
from kvote.numbers import check_whole
from kvote.read.per_head import ReadsLists, winners
from kvote.read.reader import Reading
from kvote.tokens import Span, TokenSet

# Float32 entries of scores held at a time (64 MiB).
_SCORES_HELD = 1 << 24


@dataclass(frozen=True)
class MostMass(ReadsLists):
    """Every query head reads the ``top_k`` tokens with its highest scores. The last ``selecting`` tokens of a prompt
    and generated ones choose, each for itself; what comes before them reads everything."""

    top_k: int
    selecting: int

    def __post_init__(self) -> None:
        check_whole(self, top_k=1, selecting=0)

    @property
    def tail(self) -> int:
        return self.selecting

    offers = ReaderOffers(cuts=ANYWHERE)

    def read(self, reading: Reading) -> Iterator[Span]:
        whole = max(0, min(reading.count, max(reading.count - reading.tail_queries, self.top_k - reading.first)))
        if whole:
            reading.activity.tokens_read = reading.first + whole
            yield Span(0, whole, [TokenSet(range(reading.first + whole))])
        row, heads = whole, reading.queries.rotated.shape[1] * len(reading.rows)
        while row < reading.count:
            stop = min(reading.count, row + max(1, _SCORES_HELD // (heads * (reading.first + reading.count))))
            yield self._chosen(reading, row, stop)
            row = stop

    def _chosen(self, reading: Reading, row: int, stop: int) -> Span:
        """Rows ``row`` to ``stop``, each with its own list in each head."""
        last = reading.first + stop
        scores = reading.segment.scores(reading.queries.rotated[:, :, row:stop], reading.rows, 0, last)
        limits = torch.arange(reading.first + row + 1, last + 1, device=scores.device)
        later = torch.arange(last, device=scores.device) >= limits[:, None]
        # A scale and a soft cap leave the order of the scores as it is.
        index = winners(scores.masked_fill(later[None, :, None], -torch.inf), self.top_k)
        reading.activity.selections += len(reading.rows) * (stop - row)
        reading.activity.tokens_read = index.shape[-1]
        return Span(row, stop, [TokenSet(index, causal=False)])
