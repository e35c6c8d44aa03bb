"""Quantised segments: packed tokens and, behind them, the most recent ones as the model made them.

Of n tokens, keys are packed in whole runs of ``residual`` tokens, floor(n / residual) * residual of them, and values as
soon as ``residual`` younger ones exist, max(0, n - residual) of them; so are keys that form groups by token. Each token
is packed once. A key that is packed before its value is replaced, where it is uncompressed, by what it decodes to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvote.kernels.contract import Answer
from kvote.needs import Needs, StoreOffers
from kvote.rope import Rope
from kvote.store.codec import Codec
from kvote.store.packed import BLOCK, PackedLanes
from kvote.store.packed_region import PackedRegion
from kvote.store.pages import PAGE
from kvote.store.segment import Scaling, Segment
from kvote.store.sequence import RegionSegment
from kvote.tokens import TokenSet


class QuantisedSegment(RegionSegment):
    """Tokens of a layer of which all but the most recent are packed. With a ``rope``, keys are packed at position 0 and
    rotated when they are read; without, as the model rotated them."""

    def __init__(
        self, heads: int, like: Tensor, value_dim: int, rope: Rope | None, *, codec: Codec, residual: int
    ) -> None:
        self.residual = residual
        self.packed = self.region(heads, like, value_dim, codec)
        super().__init__(heads, like, value_dim, rope, [self.packed])

    def region(self, heads: int, like: Tensor, value_dim: int, codec: Codec) -> PackedRegion:
        return PackedRegion(heads, like, value_dim, codec)

    @property
    def keys(self) -> PackedLanes:
        return self.packed.keys

    @property
    def values(self) -> PackedLanes:
        return self.packed.values

    def compress(self, prompt_left: int) -> bool:
        """Packs what is old enough, once the prompt has ended: until then its own queries read it as it is."""
        if prompt_left:
            return False
        alike: dict[tuple[int, ...], list[int]] = {}
        for row in range(self.sequences):
            alike.setdefault((self.length(row), *self._state(row)), []).append(row)
        before = [self._state(row)[:2] for row in range(self.sequences)]
        freed = [self._compress(rows) for rows in alike.values()]
        if any(freed):
            self.uncompressed.trim()
        return before != [self._state(row)[:2] for row in range(self.sequences)]

    def _state(self, row: int) -> tuple[int, int, int]:
        """Keys packed, values packed, and the token with which the uncompressed pages begin."""
        return self.keys.length(row), self.values.length(row), self.begin(row)

    def _compress(self, rows: list[int]) -> bool:
        """Packs what is old enough of rows alike; whether uncompressed pages became free."""
        n, (keys, values, first) = self.length(rows[0]), self._state(rows[0])
        more_values = max(values, n - self.residual)
        more_keys = more_values if self.packed.codec.keys_by_token else max(keys, n // self.residual * self.residual)
        if (more_keys, more_values) == (keys, values):
            return False
        uncompressed = self.uncompressed.pool
        whole = (self.keys, keys, more_keys, uncompressed.keys), (self.values, values, more_values, uncompressed.values)
        for part, done, until, pool in whole:
            if until - done > BLOCK:
                part.reserve(rows, until - done)
            for start in range(done, until, BLOCK):
                stop = min(start + BLOCK, until)
                part.append(rows, self.uncompressed._view(pool, rows, start - first, stop - first))
        if more_keys > keys:
            self._replace_keys(rows, max(keys, more_values), more_keys)
        self._give_back(rows, (more_values - first) // PAGE)
        return self._state(rows[0])[2] > first or more_keys > keys

    def _replace_keys(self, rows: list[int], start: int, stop: int) -> None:
        """Makes uncompressed keys of some tokens what they decode to; what follows them stays."""
        first, n = self.begin(rows[0]), self.length(rows[0])
        if start >= stop:
            return
        # Copies, since they are written over.
        key, value = (part.clone() for part in self.uncompressed.decode(rows, start - first, n - first))
        positions = torch.stack([torch.stack(self.uncompressed.positions(row))[:, start - first :] for row in rows])
        key[:, :, : stop - start] = self.keys.unpack(rows, range(start, stop))
        for row in rows:
            self.uncompressed.truncate(row, start - first)
        self.uncompressed.put(rows, key, value, positions)

    def _give_back(self, rows: list[int], pages: int) -> None:
        """Forgets whole uncompressed pages whose tokens are packed."""
        if pages <= 0:
            return
        for row in rows:
            kinds = len(self.packed.positions(row))
            self.packed.leave(row, torch.stack(self.uncompressed.positions(row)[:kinds])[:, : pages * PAGE])
            for i in range(row * self.heads, (row + 1) * self.heads):
                self.uncompressed.pool.drop_front(self.uncompressed.pool.lanes[i], pages)

    # Votes, and lists for one query each, are one call over packed and uncompressed tokens.

    def votes(self, query: Tensor, rows: list[int], start: int, limits: list[int]) -> Tensor:
        if not any(self.encoded(row) for row in rows):
            return self.uncompressed.votes(query, rows, start, limits)
        return self.packed.votes(query, rows, self.uncompressed, start, limits)

    def winners(self, query: Tensor, rows: list[int], start: int, limits: list[int], k: int) -> Tensor:
        if not any(self.encoded(row) for row in rows):
            return self.uncompressed.winners(query, rows, start, limits, k)
        return self.packed.winners(query, rows, self.uncompressed, start, limits, k)

    def _attend_list(self, query: Tensor, rows: list[int], tokens: TokenSet, scaling: Scaling) -> Answer:
        answer = self.packed.attend_list(query, rows, tokens, self.uncompressed, self.rope, scaling)
        return super()._attend_list(query, rows, tokens, scaling) if answer is None else answer

    def tokens_within(self, nbytes: float, extra_bytes: int = 0) -> int:
        uncompressed = self.uncompressed.tokens_within(nbytes, extra_bytes)
        lanes = max(1, self.sequences * self.heads)
        # The residual, as many keys that wait for their run to be full, and unfilled pages.
        recent = 2 * self.residual + 4 * PAGE
        each = self.uncompressed.pool.parts
        spent = recent * sum(part[:0].element_size() * part.shape[1:].numel() for part in each.values()) / PAGE
        packed_bytes = (self.keys.token_bytes + self.values.token_bytes + extra_bytes + 4) * (
            1 + 1 / self.keys.pool.room
        )
        return max(uncompressed, int((nbytes / lanes - spent) / packed_bytes))


@dataclass(frozen=True)
class Quantised:
    """Old tokens are packed in ``bits`` per number: keys per channel in groups of ``group_size`` tokens, values per
    token in groups of ``group_size`` channels. The last ``residual`` tokens stay as they are."""

    bits: int
    group_size: int
    residual: int
    needs = Needs(lasting=True)
    offers = StoreOffers()

    def token_bytes(self, heads: int, dim: int, dtype: torch.dtype) -> float:
        return Codec(self.bits, self.group_size).token_bytes(dim, dtype) + 4

    def new_segment(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None) -> QuantisedSegment:
        codec = Codec(self.bits, self.group_size)
        return QuantisedSegment(heads, like, value_dim, rope, codec=codec, residual=self.residual)

    def after_layer(self, segments: Sequence[Segment | None], index: int, prompt_left: int) -> bool:
        return False
