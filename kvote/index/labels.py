"""Labels: a few channels of each key, kept apart, that decide most of its score."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvote.errors import MethodError
from kvote.index.column import KeyPages
from kvote.store.pages import PAGE, Lane

NAME = "labels"


@dataclass(frozen=True)
class LabelIndex:
    """The first ``share`` of the channels in ``order``: by layer and key head all channels, most important first.

    The first ``dense_layers`` layers have none.
    """

    order: dict[int, tuple[tuple[int, ...], ...]]
    share: float = 1.0
    dense_layers: int = 0
    name, required, whole_layers = NAME, True, True

    def token_bytes(self, dim: int, dtype: torch.dtype) -> float:
        return self._channels(dim) * dtype.itemsize

    def _channels(self, dim: int) -> int:
        return max(1, round(self.share * dim))

    def column(self, keys: KeyPages, layer: int) -> "Labels | None":
        if layer < self.dense_layers:
            return None
        order = torch.tensor(self.order.get(layer, ()))
        if len(order) != keys.heads:
            raise MethodError(
                f"The calibration knows {len(order)} key heads of layer {layer}, which has {keys.heads}; calibrate "
                "this model."
            )
        channels = order[:, : self._channels(order.shape[1])].to(keys.pool.device, copy=True)
        keys.pool.add(NAME, channels.shape[1], PAGE)
        return Labels(keys, channels)


@dataclass
class Labels:
    """``channels`` [h, r] of a segment's keys once more, in the pool as [pages, r, PAGE], a page of each in a row."""

    keys: KeyPages
    channels: Tensor
    coded = None

    @property
    def nbytes(self) -> int:
        return self.channels.untyped_storage().nbytes()

    def write(self, lanes: Sequence[Lane], start: int, key: Tensor) -> None:
        pool, stop = self.keys.pool, start + key.shape[2]
        slots = torch.cat([pool.slots(lane, start, stop) for lane in lanes])
        pool.parts[NAME][slots // PAGE, :, slots % PAGE] = self._labelled(key).flatten(0, 2)

    def scores(self, query: Tensor, rows: list[int], start: int, stop: int) -> Tensor:
        """Scores like those of ``Segment.scores``, over these channels alone."""
        labels, table = self.keys.pool.parts[NAME], self.keys.table(rows)
        return self.keys.kernels.label_scores(self._labelled(query), labels, table, start, stop)

    def _labelled(self, rows: Tensor) -> Tensor:
        """The channels [b, heads, t, r] of keys [b, h, t, d], or of queries with several heads per key head."""
        b, heads, t, _ = rows.shape
        channels = self.channels.repeat_interleave(heads // self.keys.heads, dim=0)
        return rows.gather(3, channels[None, :, None].expand(b, -1, t, -1))
