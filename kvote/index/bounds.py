"""Page bounds: the smallest and largest number that each key channel has among a few neighbouring tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvote.index.column import KeyPages
from kvote.store.pages import PAGE, Lane

NAME = "page bounds"


@dataclass(frozen=True)
class BoundsIndex:
    """Bounds of every ``page`` tokens; the first ``dense_layers`` layers have none."""

    page: int
    dense_layers: int = 0
    name, required, whole_layers = NAME, True, False

    def token_bytes(self, dim: int, dtype: torch.dtype) -> float:
        return 2 * dim * dtype.itemsize / self.page

    def column(self, keys: KeyPages, layer: int) -> "Bounds | None":
        if layer < self.dense_layers:
            return None
        keys.pool.add(NAME, PAGE // self.page, 2, keys.pool.keys.shape[-1])
        return Bounds(keys, self.page)


@dataclass
class Bounds:
    """Minimum and maximum of the keys of every ``page`` tokens, in the pool as [pages, PAGE / page, 2, d]."""

    keys: KeyPages
    page: int
    coded, nbytes = None, 0

    def write(self, lanes: Sequence[Lane], start: int, key: Tensor) -> None:
        # A page that is already begun is bounded anew, from its first token on.
        pool, stop, d = self.keys.pool, start + key.shape[2], key.shape[3]
        slots = torch.stack([pool.slots(lane, start // self.page * self.page, stop) for lane in lanes])
        rows = pool.keys.view(-1, d)[slots]
        # The last token fills the last page up, which changes no bound.
        rows = torch.cat([rows, rows[:, -1:].expand(-1, -slots.shape[1] % self.page, -1)], dim=1)
        held = rows.view(len(lanes), -1, self.page, d)
        at = slots[:, :: self.page] // self.page
        pool.parts[NAME].view(-1, 2, d)[at] = torch.stack([held.amin(2), held.amax(2)], dim=2)

    def of(self, rows: list[int], stop: int) -> tuple[Tensor, Tensor]:
        """The bounds of each page of tokens before ``stop``, the lower and the upper ones [b, h, pages, d]."""
        d = self.keys.pool.keys.shape[-1]
        held = self.keys.pool.parts[NAME][self.keys.pages(rows)].reshape(len(rows), self.keys.heads, -1, 2, d)
        low, high = held[:, :, : -(-stop // self.page)].unbind(3)
        return low, high

    def scores(self, query: Tensor, rows: list[int], stop: int) -> Tensor:
        """The most [b, heads, r, pages] that q.k of ``query`` [b, heads, r, d] can be in each page of tokens before
        ``stop``, float32."""
        b, heads, r, d = query.shape
        low, high = (each.float() for each in self.of(rows, stop))
        grouped = query.float().reshape(b, self.keys.heads, -1, d)
        # Each channel of a query meets the bound with which its product is larger.
        return (grouped.clamp(min=0) @ high.mT + grouped.clamp(max=0) @ low.mT).reshape(b, heads, r, -1)
