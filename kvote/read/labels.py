"""Tokens chosen by their labels: a few channels of each key, kept apart, that decide most of its score."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from kvote.errors import MethodError
from kvote.index.labels import NAME, LabelIndex
from kvote.needs import ANYWHERE, Needs, ReaderOffers
from kvote.numbers import check_whole
from kvote.read.per_head import LISTS, ReadsLists, span_of, winners
from kvote.read.reader import Reading, everything
from kvote.tokens import Span


@dataclass(frozen=True)
class LabelWinners(ReadsLists):
    """Parameters as in ``methods/doublesparsity.py``, which documents them.

    ``order``: by layer and key head all channels, most important first.
    """

    order: dict[int, tuple[tuple[int, ...], ...]]
    top_k: int
    share: float
    dense_layers: int

    def __post_init__(self) -> None:
        check_whole(self, top_k=1, dense_layers=0)
        if not isinstance(self.share, int | float) or isinstance(self.share, bool) or not 0 < self.share <= 1:
            raise MethodError(f"share must be a share of the channels, above 0 and at most 1; got {self.share!r}.")

    @cached_property
    def needs(self) -> Needs:
        return replace(LISTS, indexes=(LabelIndex(self.order, self.share, self.dense_layers),))

    offers = ReaderOffers(cuts=ANYWHERE)

    def read(self, reading: Reading) -> Iterator[Span]:
        n, labels = reading.first + reading.count, reading.segment.indexes.get(NAME)
        if labels is None or not reading.decode or n <= self.top_k:
            yield everything(reading)
            return
        reading.activity.selections += len(reading.rows)
        yield span_of(reading, winners(labels.scores(reading.queries.rotated, reading.rows, 0, n), self.top_k))
