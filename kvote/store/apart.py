"""Attention sinks stay as the model made them, and all other tokens are packed (RotateKV, Su et al. 2025, arXiv
2501.16383). Sinks are the tokens with the largest entries of all that enter a layer: massive activations mark them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvote.extra_inputs import INPUTS, ExtraInputs
from kvote.memory import storage_bytes
from kvote.needs import Keys, Needs, StoreOffers
from kvote.rope import Rope
from kvote.store.codec import Codec
from kvote.store.packed_region import PackedRegion
from kvote.store.quantised import QuantisedSegment
from kvote.store.region import Slots
from kvote.store.segment import Segment
from kvote.tokens import Queries


@dataclass(frozen=True)
class Largest:
    """The largest magnitudes among the entries of what has entered a layer with the prompts of one sequence, float32
    [k], and the original positions of their tokens, int64 [k], ascending. Entries that were among the largest when
    their token came stay among them until ``only``, so that the last tokens can be taken back."""

    sizes: Tensor
    positions: Tensor

    def and_of(self, states: Tensor, positions: Tensor, count: int) -> "Largest":
        """These and what may be among the ``count`` largest of ``states`` [t, width] of tokens at ``positions`` [t]."""
        entries, sizes, places = states.float().abs(), self.sizes, self.positions
        start, stop = 0, 1
        while start < len(entries):
            # Each stretch is as long as all before it, so few more than the largest pass.
            bar = sizes.topk(count).values[-1] if len(sizes) >= count else entries.new_tensor(-1.0)
            passing = start + (entries[start:stop] > bar).any(dim=1).nonzero()[:, 0]
            tops = entries[passing].topk(min(count, entries.shape[1]), dim=1).values
            at = tops > bar
            sizes = torch.cat([sizes, tops[at]])
            places = torch.cat([places, positions[passing].long()[:, None].expand(tops.shape)[at]])
            start, stop = stop, 2 * stop
        return Largest(sizes, places)

    def only(self, count: int) -> "Largest":
        """The ``count`` largest; of equal ones, the earlier."""
        if len(self.sizes) <= count:
            return self
        chosen = self.sizes.argsort(descending=True, stable=True)[:count].sort().values
        return Largest(self.sizes[chosen], self.positions[chosen])

    def before(self, position: int) -> "Largest":
        """Those of earlier tokens."""
        stay = self.positions < position
        return Largest(self.sizes[stay], self.positions[stay])


@dataclass(frozen=True)
class Exact:
    """Tokens of one sequence as the model made them, beside their codes: ``key`` [s, d] and ``value`` [s, dv] of those
    in slots ``slots`` int64 [s] of the key heads ``heads`` int64 [s]."""

    heads: Tensor
    slots: Tensor
    key: Tensor
    value: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.heads, self.slots, self.key, self.value

    def until(self, slot: int) -> "Exact":
        """Those in earlier slots."""
        stay = self.slots < slot
        return self if bool(stay.all()) else Exact(*(part[stay] for part in self.tensors))

    def put(self, key: Tensor, value: Tensor, slots: Slots, groups: int) -> None:
        """Writes them over what decoded: ``key`` [lists, >= m, d] and ``value`` of a range, or of ``slots`` [lists, m].
        ``groups``: lists per key head."""
        if isinstance(slots, range):
            at = ((self.slots >= slots.start) & (self.slots < slots.stop)).nonzero()[:, 0]
            where = self.heads[at], self.slots[at] - slots.start
        else:
            head = torch.arange(len(slots), device=slots.device)[:, None, None] // groups
            first, second, at = ((slots[..., None] == self.slots) & (head == self.heads)).nonzero().unbind(1)
            where = first, second
        key[where], value[where] = self.key[at], self.value[at]


class ApartRegion(PackedRegion):
    """Packed tokens, some of which are held exactly as well."""

    def __init__(self, heads: int, like: Tensor, value_dim: int, codec: Codec) -> None:
        super().__init__(heads, like, value_dim, codec)
        none = torch.empty(0, dtype=torch.int64, device=like.device)
        self.none = Exact(none, none, like.new_empty(0, like.shape[-1]), like.new_empty(0, value_dim))
        self.exact: list[Exact] = []

    @property
    def nbytes(self) -> int:
        return super().nbytes + storage_bytes([part for exact in self.exact for part in exact.tensors])

    def add_sequences(self, count: int) -> None:
        super().add_sequences(count)
        self.exact += [self.none] * count

    def decode(self, rows: list[int], slots: Slots, room: int = 0) -> tuple[Tensor, Tensor]:
        key, value = super().decode(rows, slots, room)
        for i, row in enumerate(rows):
            if len(self.exact[row].slots):
                own = slots if isinstance(slots, range) else slots[i].expand(key.shape[1], -1)
                self.exact[row].put(key[i], value[i], own, key.shape[1] // self.heads)
        return key, value

    def add_exact(self, row: int, first: int, which: Tensor, key: Tensor, value: Tensor) -> None:
        """Holds the tokens that ``which`` [h, n] marks among those from slot ``first`` on, ``key`` [h, n, d] and
        ``value``, exactly."""
        heads, slots = which.nonzero().unbind(1)
        new = heads, slots + first, key[heads, slots], value[heads, slots]
        self.exact[row] = Exact(*(torch.cat(pair) for pair in zip(self.exact[row].tensors, new, strict=True)))

    def keep(self, row: int, slots: Slots, content: tuple[Tensor, Tensor] | None) -> None:
        super().keep(row, slots, content)
        self.exact[row] = self.exact[row].until(self.length(row))

    def select(self, index: list[int]) -> None:
        super().select(index)
        self.exact = [self.exact[i] for i in index]


class ApartSegment(QuantisedSegment):
    """A quantised segment in which the tokens with the ``sinks`` largest entries stay exact."""

    def __init__(
        self,
        heads: int,
        like: Tensor,
        value_dim: int,
        rope: Rope | None,
        *,
        codec: Codec,
        residual: int,
        sinks: int,
    ) -> None:
        super().__init__(heads, like, value_dim, rope, codec=codec, residual=residual)
        assert isinstance(self.packed, ApartRegion)
        self.apart, self.sinks = self.packed, sinks
        self.largest: list[Largest] = []

    def region(self, heads: int, like: Tensor, value_dim: int, codec: Codec) -> ApartRegion:
        return ApartRegion(heads, like, value_dim, codec)

    @property
    def nbytes(self) -> int:
        return super().nbytes + storage_bytes([part for each in self.largest for part in (each.sizes, each.positions)])

    def add_sequences(self, count: int) -> None:
        super().add_sequences(count)
        none = torch.empty(0, device=self.device)
        self.largest += [Largest(none, none.long()) for _ in range(count)]

    def observe_queries(
        self, queries: Queries, rows: list[int], prompt_left: int | None, extra_bytes: ExtraInputs | None = None
    ) -> None:
        if prompt_left is None or not self.sinks:
            return
        assert extra_bytes is not None
        assert extra_bytes.inputs is not None
        t = queries.rotated.shape[2]
        # Behind a prompt's end, a pass may go on with drafts.
        count = t + min(0, prompt_left)
        if count <= 0:
            return
        for states, row in zip(extra_bytes.inputs, rows, strict=True):
            places = self.uncompressed.positions(row)[0][-t:]
            self.largest[row] = self.largest[row].and_of(states[:count], places[:count], self.sinks)

    def checkpoint(self) -> Any:
        return super().checkpoint(), list(self.largest)

    def restore(self, checkpoint: Any) -> bool:
        held, self.largest = checkpoint
        return super().restore(held)

    def compress(self, prompt_left: int) -> bool:
        if not prompt_left:
            self.largest = [each.only(self.sinks) for each in self.largest]
        return super().compress(prompt_left)

    def _compress(self, rows: list[int]) -> bool:
        first, begin = self.values.length(rows[0]), self.begin(rows[0])
        n = self.length(rows[0]) - self.residual
        for row in rows:
            if n > first and len(self.largest[row].positions):
                places = torch.stack(self.uncompressed.positions(row))[:, first - begin : n - begin]
                which = torch.isin(places, self.largest[row].positions)
                if bool(which.any()):
                    key, value = (part[0] for part in self.uncompressed.decode([row], first - begin, n - begin))
                    self.apart.add_exact(row, first, which, key, value)
        return super()._compress(rows)

    def truncate(self, row: int, length: int) -> None:
        super().truncate(row, length)
        places = [int(lane[-1]) for lane in self.positions(row)] if length else [-1]
        self.largest[row] = self.largest[row].before(max(places) + 1)

    def select(self, index: list[int]) -> None:
        super().select(index)
        self.largest = [self.largest[i] for i in index]


@dataclass(frozen=True)
class SinksApart:
    """Tokens are packed at once as ``codec`` says, but for those with the ``sinks`` largest entries of a prompt.
    ``orders``: by layer, the order of rotated key channels."""

    codec: Codec
    sinks: int
    orders: tuple[tuple[int, tuple[int, ...]], ...] = ()
    needs = Needs(keys=Keys.UNROTATED, lasting=True, whole_layers=True, extra_inputs=frozenset({INPUTS}))
    offers = StoreOffers()

    def token_bytes(self, heads: int, dim: int, dtype: torch.dtype) -> float:
        return self.codec.token_bytes(dim, dtype) + 4

    def of_layer(self, index: int) -> "SinksApart":
        order, turns = dict(self.orders).get(index, ()), self.codec.turns_keys
        if not order or turns is None:
            return self
        return replace(self, codec=replace(self.codec, turns_keys=replace(turns, order=order)))

    def new_segment(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None) -> ApartSegment:
        return ApartSegment(heads, like, value_dim, rope, codec=self.codec, residual=0, sinks=self.sinks)

    def after_layer(self, segments: Sequence[Segment | None], index: int, prompt_left: int) -> bool:
        return False
