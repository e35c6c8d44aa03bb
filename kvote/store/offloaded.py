"""Offloaded segments: all but the most recent tokens lie on a disk."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote.needs import ANYWHERE, NOTHING, StoreOffers
from kvote.numbers import check_whole
from kvote.rope import Rope
from kvote.store.disk_region import DiskRegion
from kvote.store.pages import PAGE
from kvote.store.segment import Segment
from kvote.store.sequence import RegionSegment


class OffloadedSegment(RegionSegment):
    """Tokens of a layer of which the last ``recent`` ones, and up to a page more, are in main memory."""

    def __init__(
        self, heads: int, like: Tensor, value_dim: int, rope: Rope | None, *, folder: str, recent: int
    ) -> None:
        self.recent = recent
        self.disk = DiskRegion(heads, like, value_dim, folder)
        super().__init__(heads, like, value_dim, rope, [self.disk])

    def reserve(self, tokens: int) -> None:
        """Nothing: few tokens are ever here."""

    def compress(self, prompt_left: int) -> bool:
        """Writes what is old enough, also while a prompt goes on: what is read back is what was written."""
        moved = [self._move(row) for row in range(self.sequences)]
        if any(moved):
            self.uncompressed.trim()
        return any(moved)

    def _move(self, row: int) -> bool:
        count = max(0, self.uncompressed.length(row) - self.recent) // PAGE * PAGE
        if not count:
            return False
        # All or nothing: a full disk leaves every token where it was.
        key, value = self.uncompressed.decode([row], 0, count)
        self.disk.write(row, key[0], value[0])
        kinds = 1 if self.uncompressed.alike else self.heads
        self.disk.leave(row, torch.stack(self.uncompressed.positions(row)[:kinds])[:, :count])
        for i in range(row * self.heads, (row + 1) * self.heads):
            self.uncompressed.pool.drop_front(self.uncompressed.pool.lanes[i], count // PAGE)
        return True

    def tokens_within(self, nbytes: float, extra_bytes: int = 0) -> int:
        uncompressed = self.uncompressed.tokens_within(nbytes, extra_bytes)
        lanes = max(1, self.sequences * self.heads)
        each = self.uncompressed.pool.parts
        token = sum(part[:0].element_size() * part.shape[1:].numel() for part in each.values()) / PAGE
        spent = (self.recent + 3 * PAGE) * token
        return max(uncompressed, int((nbytes / lanes - spent) / (4 + extra_bytes)))


@dataclass(frozen=True)
class Offloaded:
    """All but the last ``recent`` tokens lie in a file in ``folder``, as the model made them. Where that is changes
    nothing that is held."""

    folder: str = field(compare=False)
    recent: int
    needs = NOTHING
    offers = StoreOffers(cuts=ANYWHERE)

    def __post_init__(self) -> None:
        check_whole(self, recent=1)

    def token_bytes(self, heads: int, dim: int, dtype: torch.dtype) -> float:
        """In main memory: a position."""
        return 4

    def new_segment(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None) -> OffloadedSegment:
        return OffloadedSegment(heads, like, value_dim, rope, folder=self.folder, recent=self.recent)

    def after_layer(self, segments: Sequence[Segment | None], index: int, prompt_left: int) -> bool:
        return False
