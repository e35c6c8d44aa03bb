"""Tokens chosen by their labels: a few channels of each key, kept apart, that decide most of its score."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kvote.errors import MethodError
from kvote.numbers import check_whole
from kvote.read.per_head import ReadsLists, span_of, winners
from kvote.read.tokens import Reading, Span, everything
from kvote.store.segment import Labelled


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

    @property
    def labels(self) -> bool:
        return True

    def read(self, reading: Reading) -> Iterator[Span]:
        n = reading.first + reading.count
        if reading.layer < self.dense_layers:
            yield everything(reading)
            return
        segment = self._labelled(reading)
        if not reading.decode or n <= self.top_k:
            yield everything(reading)
            return
        reading.activity.selections += len(reading.rows)
        scores = segment.label_scores(reading.queries.rotated, reading.rows, 0, n)
        yield span_of(reading, winners(scores, self.top_k))

    def _labelled(self, reading: Reading) -> Labelled:
        segment = reading.segment
        assert isinstance(segment, Labelled)
        if segment.labels is None:
            order = torch.tensor(self.order.get(reading.layer, ()))
            if len(order) != segment.heads:
                raise MethodError(
                    f"The calibration knows {len(order)} key heads of layer {reading.layer}, which has "
                    f"{segment.heads}; calibrate this model."
                )
            segment.label(order[:, : max(1, round(self.share * order.shape[1]))])
        return segment
