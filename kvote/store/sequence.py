"""Sequences of a layer as a list of regions: how tokens come to them, are dropped, cut and copied."""

from typing import Any

import torch
from torch import Tensor

from kvote.extra_inputs import ExtraInputs
from kvote.store.reading import ReadRegions
from kvote.store.region import Slots
from kvote.tokens import Queries


class RegionSegment(ReadRegions):
    """As ``Segment``: encoded regions and the uncompressed tokens behind them. New tokens are uncompressed; a subclass
    says in ``compress`` when which of them are encoded."""

    def add_sequences(self, count: int) -> None:
        self.uncompressed.add_sequences(count)
        for region in self.regions:
            region.add_sequences(count)

    def reserve(self, tokens: int) -> None:
        """Makes room where new tokens lie."""
        self.uncompressed.reserve(tokens)

    def append(self, rows: list[int], key: Tensor, value: Tensor, positions: Tensor) -> None:
        self.uncompressed.append(rows, key, value, positions)

    def observe_queries(
        self, queries: Queries, rows: list[int], prompt_left: int | None, extra_bytes: ExtraInputs | None = None
    ) -> None:
        pass

    def checkpoint(self) -> Any:
        """New tokens are uncompressed until they are compressed."""
        return self.uncompressed.checkpoint()

    def restore(self, checkpoint: Any) -> bool:
        return self.uncompressed.restore(checkpoint)

    def compress(self, prompt_left: int) -> bool:
        return False

    # Taking tokens away.

    def keep(self, row: int, slots: Tensor, content: tuple[Tensor, Tensor] | None = None) -> None:
        """As ``Segment.keep``. What a region cannot hold on to is decoded, and raw from now on."""
        slots = slots.to(self.device)
        self._keep(row, slots[None] if slots.dim() == 1 else slots, content)
        self.trim()

    def truncate(self, row: int, length: int) -> None:
        self._keep(row, range(length), None)

    def _keep(self, row: int, slots: Slots, content: tuple[Tensor, Tensor] | None) -> None:
        """``slots``: a range from 0, or [1 or h, m]."""
        n, begin, shares = self.encoded(row), self.begin(row), []
        # Of the tokens that stay: how many are still encoded, and how many of these lie nowhere else.
        held = alone = offset = 0
        whole = True
        for region in self.regions:
            # A token that a region cannot hold on to empties all later ones, so that tokens stay in their order.
            own = _behind(slots, held, offset) if whole else range(0)
            count, only = region.holds(row, own, content is not None)
            shares.append((region, own, held, count))
            offset += region.length(row)
            held, alone = held + count, alone + only
            whole = whole and held == _before(slots, offset)
        # Uncompressed tokens stay where they are if those in front of them do, or if none of them are encoded as well.
        stay = whole and (alone == begin if held == n else n == begin and held == alone)
        again = None if stay else self._decoded(row, slots, content, alone)
        for region, own, first, count in shares:
            region.keep(row, own, _part(content, first, first + count))
        if again is None:
            self._keep_raw(row, slots, content, held, n - begin, begin)
            return
        self.uncompressed.truncate(row, 0)
        if again[0].shape[2]:
            self.uncompressed.put([row], *again)

    def _keep_raw(
        self, row: int, slots: Slots, content: tuple[Tensor, Tensor] | None, held: int, hidden: int, begin: int
    ) -> None:
        """Keeps the first ``hidden`` uncompressed tokens, which are encoded as well, and those that ``slots`` name
        behind the first ``held``."""
        if isinstance(slots, range):
            self.uncompressed.truncate(row, max(0, len(slots) - begin))
            return
        kept = slots[:, held:] - begin
        if hidden:
            kept = torch.cat([torch.arange(hidden, device=self.device).expand(len(slots), -1), kept], dim=1)
        self.uncompressed.keep(row, kept, _part(content, held, slots.shape[1]))

    def _decoded(
        self, row: int, slots: Slots, content: tuple[Tensor, Tensor] | None, first: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of keys, values [1, h, m, c] and positions [1, h, m] of tokens that stay, from the ``first`` on."""
        places = torch.stack(self.positions(row))
        if isinstance(slots, range):
            key, value = self.tokens([row], first, len(slots))
            return key.clone(), value.clone(), places[None, :, first : len(slots)]
        rest, new = slots[:, first:], _part(content, first, slots.shape[1])
        if new is None:
            key, value = self.listed([row], rest if len(rest) == 1 else rest[None])
        else:
            key, value = new[0][None], new[1][None]
        return key, value, places.gather(1, rest.expand(self.heads, -1))[None]

    def select(self, index: list[int]) -> None:
        self.uncompressed.select(index)
        for region in self.regions:
            region.select(index)

    def trim(self) -> None:
        for pool in self.pools:
            pool.trim()

    def tokens_within(self, nbytes: float, extra_bytes: int = 0) -> int:
        return self.uncompressed.tokens_within(nbytes, extra_bytes)


def _behind(slots: Slots, held: int, offset: int) -> Slots:
    """Those of ``slots`` behind the first ``held``, as they are called from token ``offset`` on."""
    return range(max(0, len(slots) - offset)) if isinstance(slots, range) else slots[:, held:] - offset


def _before(slots: Slots, stop: int) -> int:
    """How many of ``slots`` lie before token ``stop``, in the key head that has most of them."""
    return min(len(slots), stop) if isinstance(slots, range) else int((slots < stop).sum(dim=1).max())


def _part(content: tuple[Tensor, Tensor] | None, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
    return None if content is None else (content[0][:, start:stop], content[1][:, start:stop])
