"""Two precisions: tokens that a keeper drops stay, in a few bits, and answer every query. It is a way to drop less."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvote import kernels
from kvote.errors import MethodError
from kvote.extra_inputs import ExtraInputs
from kvote.kernels import packing
from kvote.kernels.packing import Packing
from kvote.memory import storage_bytes
from kvote.needs import Keys, Needs, StoreOffers
from kvote.rope import Rope
from kvote.store.packed import BLOCK, PackedLanes
from kvote.store.pages import PagePool
from kvote.store.segment import Scaling, Segment
from kvote.store.uncompressed import UncompressedSegment
from kvote.store.uncompressed_tokens import token_bytes
from kvote.tokens import Queries, TokenSet

Answer = tuple[Tensor, Tensor]

# Low precision that encodes nothing: what it costs to move tokens about can be told from what it costs to encode them.
RAW_BITS = 16
# Query rows per key head that read the codes themselves; more of them share decoded blocks.
_STREAMED = 64


@dataclass(frozen=True)
class Balance:
    """What one sequence knows about its key channels, float32 [h, d]: the largest magnitudes that queries and keys of
    the prompt had, and from its first demoted token on the ``factor`` that keys are multiplied with. Copies of the
    sequence share it."""

    query: Tensor
    key: Tensor
    factor: Tensor | None = None

    def fixed(self) -> "Balance":
        """With the factor sqrt(largest query / largest key) per channel, 1 where either is 0; the same for good."""
        if self.factor is not None:
            return self
        known = (self.query > 0) & (self.key > 0)
        factor = torch.sqrt(self.query / torch.where(known, self.key, torch.ones_like(self.key)))
        factor = torch.where(known, factor, torch.ones_like(factor))
        return replace(self, query=factor[:0], key=factor[:0], factor=factor)


class TwoPrecisionSegment(UncompressedSegment):
    """Important tokens as the model made them, in slots; the others without slots, packed in ``bits`` per number in
    groups of ``group_size`` channels of one token, in the order in which they were demoted.

    Keys are packed times a factor per sequence, key head and channel, by which queries are divided in turn
    (``balanced``): rounding then weighs on a channel as much as queries make use of it.
    """

    def __init__(self, heads: int, like: Tensor, value_dim: int, *, bits: int, group_size: int, balanced: bool) -> None:
        super().__init__(heads, like, value_dim, None)
        # Codes have slots of their own: none that a reader, a keeper or the layer could name.
        self.balanced = balanced and bits != RAW_BITS
        self.balances: list[Balance] = []
        # Prompt queries [heads, t, d] of each sequence, and the slot of the first, until they cannot be rolled back.
        self.waiting: list[list[tuple[Tensor, int]]] = []
        self.whole = UncompressedSegment(heads, like, value_dim, None) if bits == RAW_BITS else None
        dim, each = like.shape[-1], (min(bits, 8), group_size)
        reads = kernels.chosen(like, like.new_empty(0, value_dim))
        self.keys = PackedLanes(heads, Packing(*each, dim, like.dtype, True, True), like.device, backend=reads)
        self.values = PackedLanes(heads, Packing(*each, value_dim, like.dtype, False), like.device, backend=reads)

    @property
    def pools(self) -> list[PagePool]:
        return [self.pool, *(part.pool for part in self._low)]

    @property
    def _low(self) -> list[PackedLanes | UncompressedSegment]:
        """What holds the demoted tokens."""
        return [self.keys, self.values] if self.whole is None else [self.whole]

    @property
    def nbytes(self) -> int:
        held = [t for b in self.balances for t in (b.query, b.key, b.factor) if t is not None]
        held += [query for passes in self.waiting for query, _ in passes]
        return sum(pool.nbytes for pool in self.pools) + storage_bytes(held)

    def retained(self, row: int) -> int:
        """Demoted tokens of a sequence, as many in each key head."""
        return self._low[0].length(row)

    def add_sequences(self, count: int) -> None:
        super().add_sequences(count)
        for part in self._low:
            part.add_sequences(count)
        none = torch.zeros(self.heads, self.keys.form.dim if self.balanced else 0, device=self.device)
        self.balances += [Balance(none, none) for _ in range(count)]
        self.waiting += [[] for _ in range(count)]

    # What the queries of a prompt are like.

    def observe_queries(
        self, queries: Queries, rows: list[int], prompt_left: int | None, extra_bytes: ExtraInputs | None = None
    ) -> None:
        if not self.balanced or prompt_left is None:
            return
        # Behind a prompt's end, a pass may go on with drafts.
        t = queries.rotated.shape[2]
        count = t + min(0, prompt_left)
        for query, row in zip(queries.rotated, rows, strict=True):
            if count > 0 and self.balances[row].factor is None:
                self.waiting[row].append((query[:, :count], self.length(row) - t))

    def checkpoint(self) -> Any:
        return super().checkpoint(), list(self.balances), [list(passes) for passes in self.waiting]

    def restore(self, checkpoint: Any) -> bool:
        held, self.balances, self.waiting = checkpoint
        return super().restore(held)

    def compress(self, prompt_left: int) -> bool:
        due = any(self.waiting)
        for row in range(self.sequences):
            self._weigh(row)
        return due

    def _weigh(self, row: int) -> None:
        """Takes the largest magnitudes of the queries that wait, and of the keys that came with them."""
        waiting, self.waiting[row] = self.waiting[row], []
        for query, first in waiting:
            balance, count = self.balances[row], query.shape[1]
            by_key_head = query.reshape(self.heads, -1, query.shape[-1])
            key = self.decode([row], first, first + count)[0][0]
            # New tensors: copies of the sequence share the old ones.
            self.balances[row] = Balance(
                torch.maximum(balance.query, _largest(by_key_head)), torch.maximum(balance.key, _largest(key))
            )

    # Demotion.

    def keep(self, row: int, slots: Tensor, content: tuple[Tensor, Tensor] | None = None) -> None:
        """Tokens in ``slots`` keep their slots; all others are demoted. Raises MethodError with ``content``: what has
        been merged into others cannot stay as well."""
        if content is not None:
            raise MethodError("Tokens that are merged into others cannot be retained in low precision as well.")
        slots = slots.to(self.device).expand(self.heads, -1)
        length = self.length(row)
        gone = torch.ones(self.heads, length, dtype=torch.bool, device=self.device).scatter_(1, slots, False)
        if length > slots.shape[1]:
            index = gone.nonzero()[:, 1].view(self.heads, -1)
            self._demote(row, index)
        super().keep(row, slots)

    def _demote(self, row: int, index: Tensor) -> None:
        """Adds the tokens in slots ``index`` [h, m] to those in low precision."""
        self._weigh(row)
        if self.whole is not None:
            key, value, at = self.read([row], TokenSet(range(self.length(row))))
            key, value, at = (part.gather(2, _channels(index[None], part)) for part in (key, value, at[..., None]))
            # Positions differ by head, and nobody asks for those of tokens without a slot.
            self.whole.append([row], key, value, at[:, 0, :, 0])
            return
        tokens = self.decode([row], 0, self.length(row))
        key, value = (part[0].gather(1, _channels(index, part)) for part in tokens)
        if self.balanced:
            key = (key.float() * self._factor(row)[:, None]).to(key.dtype)
        self.keys.append([row], key[None])
        self.values.append([row], value[None])

    def _factor(self, row: int) -> Tensor:
        balance = self.balances[row] = self.balances[row].fixed()
        assert balance.factor is not None
        return balance.factor

    # What demoted tokens answer.

    def slotless_attention(self, queries: Queries, rows: list[int], scaling: Scaling) -> Answer | None:
        counts = [self.retained(row) for row in rows]
        if not any(counts):
            return None
        if len(set(counts)) == 1:
            return self._answer(queries.rotated, rows, counts[0], scaling)
        # Sequences that hold equally many important tokens may retain unequally many others.
        b, heads, t, _ = queries.rotated.shape
        out = queries.rotated.new_zeros(b, heads, t, self.values.form.dim)
        lse = torch.full((b, heads, t), float("-inf"), device=self.device)
        for count in set(counts) - {0}:
            at = [i for i, own in enumerate(counts) if own == count]
            answer, own = self._answer(queries.rotated[at], [rows[i] for i in at], count, scaling)
            out[at], lse[at] = answer, own.to(lse.dtype)
        return out, lse

    def _answer(self, query: Tensor, rows: list[int], count: int, scaling: Scaling) -> Answer:
        """Attention of ``query`` [b, heads, t, d] over the ``count`` demoted tokens that each of the rows has."""
        if self.whole is not None:
            return self.whole.attend(Queries(query), rows, TokenSet(range(count), causal=False), scaling)
        b, heads, t, d = query.shape
        balanced = query
        if self.balanced:
            factor = torch.stack([self._factor(row) for row in rows])
            balanced = (query.float().reshape(b, self.heads, -1, d) / factor[:, :, None]).view(b, heads, t, d)
        scale, softcap = scaling.scale, scaling.softcap
        few = heads // self.heads * t <= _STREAMED
        if few and self.keys.reads(1) and self.keys.form.dim == self.values.form.dim:
            # None of these tokens is later than any query, so all positions of a sequence read them like more heads.
            held = self.keys.held(rows), self.values.held(rows)
            out, lse = self.keys.backend.packed.attend(
                balanced.reshape(b, heads * t, d), *held, range(count), scale=scale, softcap=softcap
            )
            return out.view(b, heads, t, d).to(query.dtype), lse.view(b, heads, t)
        answers = []
        for start in range(0, count, BLOCK):
            block = range(start, min(start + BLOCK, count))
            key, value = self.keys.unpack(rows, block), self.values.unpack(rows, block)
            read = balanced.to(key.dtype)
            out, lse = kernels.attend(read, key, value, scale=scale, softcap=softcap, causal=False)
            answers.append((out.float(), lse))
        out, lse = kernels.merge(answers)
        return out.to(query.dtype), lse

    # Copies, rollbacks, sizes.

    def truncate(self, row: int, length: int) -> None:
        super().truncate(row, length)
        self.waiting[row] = [
            (query[:, : length - first], first) for query, first in self.waiting[row] if first < length
        ]

    def select(self, index: list[int]) -> None:
        super().select(index)
        for part in self._low:
            part.select(index)
        self.balances = [self.balances[i] for i in index]
        self.waiting = [list(self.waiting[i]) for i in index]

    def trim(self) -> None:
        for pool in self.pools:
            pool.trim()

    def tokens_within(self, nbytes: float, extra_bytes: int = 0) -> int:
        """Important tokens that fit beside all others of the longest sequence in low precision."""
        longest = max((self.length(row) + self.retained(row) for row in range(self.sequences)), default=0)
        nbytes -= 4 * self.heads * self.sequences * self.keys.form.dim * self.balanced
        tokens, before = 0, -1
        # Every token that stays important is one less in low precision, which leaves room for a few more. Found from
        # below: there is room for a page in low precision besides, because bursts demote ahead of time.
        while before < tokens < longest:
            low = sum(part.pool.bytes_within(longest - tokens) for part in self._low)
            tokens, before = self.pool.tokens_within(nbytes - low, extra_bytes), tokens
        return tokens if longest else self.pool.tokens_within(nbytes, extra_bytes)


def _channels(index: Tensor, like: Tensor) -> Tensor:
    """``index`` [..., m] for each of the channels of ``like``: [..., m, c]."""
    return index[..., None].expand(*index.shape, like.shape[-1])


def _largest(x: Tensor) -> Tensor:
    """Largest magnitudes [h, d] of ``x`` [h, n, d], in float32."""
    return torch.maximum(x.amax(dim=1), -x.amin(dim=1)).float()


@dataclass(frozen=True)
class TwoPrecisions:
    """Tokens that a keeper lets go of stay in ``low_bits`` per number, in groups of ``group_size`` channels of one
    token; with ``balancer``, key channels are scaled as queries use them. Raises MethodError for a form that does not
    exist.
    """

    low_bits: int
    group_size: int
    balancer: bool = True
    needs = Needs(keys=Keys.ROTATED)
    # Demoted tokens are read as a whole or not at all.
    offers = StoreOffers(lists=False, retains=True)

    def token_bytes(self, heads: int, dim: int, dtype: torch.dtype) -> float:
        if self.low_bits == RAW_BITS:
            return token_bytes(dim, dim, dtype)
        sides = (Packing(self.low_bits, self.group_size, dim, dtype, side, side) for side in (True, False))
        return sum(side.page_bytes for side in sides) / packing.PACKED

    def __post_init__(self) -> None:
        bits = (*packing.BITS, RAW_BITS)
        if self.low_bits not in bits or isinstance(self.low_bits, bool):
            raise MethodError(f"low_bits must be one of {', '.join(map(str, bits))}; got {self.low_bits!r}.")
        if self.group_size not in packing.GROUP_SIZES:
            raise MethodError(
                f"group must be one of {', '.join(map(str, packing.GROUP_SIZES))}; got {self.group_size!r}."
            )
        if not isinstance(self.balancer, bool):
            raise MethodError(f"balancer must be True or False; got {self.balancer!r}.")

    def new_segment(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None) -> TwoPrecisionSegment:
        """As ``Store.new_segment``. Raises MethodError for keys without rotation: those of demoted tokens have lost
        their positions."""
        if rope is not None:
            raise MethodError("Tokens retained in low precision need keys as the model rotated them.")
        bits, group_size, balanced = self.low_bits, self.group_size, self.balancer
        return TwoPrecisionSegment(heads, like, value_dim, bits=bits, group_size=group_size, balanced=balanced)

    def after_layer(self, segments: Sequence[Segment | None], index: int, prompt_left: int) -> bool:
        return False
