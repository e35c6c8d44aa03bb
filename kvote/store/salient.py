"""Salient tokens in more bits than the others, keys by channel and values by channel and token (ZipCache, He et al.
2024, arXiv 2405.14256)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvote.store.bodies import PlainBody
from kvote.store.grid import coded, decoded, packed, span, unpacked
from kvote.store.region import Slots


@dataclass(frozen=True)
class Bits:
    """How many bits a number of a salient token has (``high``), and of another one (``low``): 2, 4 or 8."""

    high: int
    low: int


@dataclass(frozen=True)
class Part:
    """The tokens of one kind: codes of all key heads, one head after the other, uint8 [tokens, bytes]; least and step
    of each key channel [2, h, d], and of each row of values [2, rows], where the i-th tokens of all heads are a row."""

    keys: Tensor
    values: Tensor
    channels: Tensor
    rows: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values, self.channels, self.rows]


@dataclass(frozen=True)
class SalientBody(PlainBody):
    """Tokens of one sequence: ``high`` and ``low`` ones; ``marks`` uint8 [h, ceil(n / 8)] has a bit for each
    token, set for the salient ones; ``factor`` [h, dv] is what values were divided by; ``positions`` int32 [1 or h,
    n]."""

    bits: Bits
    high: Part
    low: Part
    marks: Tensor
    factor: Tensor
    positions: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.high.tensors, *self.low.tensors, self.marks, self.factor, self.positions]

    def salient(self) -> Tensor:
        """Which tokens are, bool [h, n]."""
        bit = torch.arange(8, dtype=torch.uint8, device=self.marks.device)
        return ((self.marks[..., None] >> bit) & 1).flatten(1)[:, : self.positions.shape[1]].bool()

    def read(self, slots: Slots) -> tuple[Tensor, Tensor]:
        salient = self.salient()
        h, n = salient.shape
        if isinstance(slots, range):
            slots = torch.arange(slots.start, slots.stop, device=salient.device)
        slots = slots if slots.dim() == 2 else slots.expand(h, -1)
        head = torch.arange(h, device=slots.device).repeat_interleave(len(slots) // h)[:, None].expand_as(slots)
        count = salient.cumsum(1)
        chosen, before = salient[head, slots], count[head, slots]
        key = self.factor.new_empty(*slots.shape, self.high.channels.shape[2])
        value = self.factor.new_empty(*slots.shape, self.factor.shape[1])
        totals = count[:, -1]
        # Of each token, the how many-th of its kind in its head it is.
        kinds = (
            (self.high, self.bits.high, chosen, before - 1, totals),
            (self.low, self.bits.low, ~chosen, slots - before, n - totals),
        )
        for part, bits, here, rank, lengths in kinds:
            own, row = head[here], rank[here]
            at = (lengths.cumsum(0) - lengths)[own] + row
            least, step = part.channels[:, own]
            key[here] = decoded(unpacked(part.keys[at], bits, key.shape[-1]), least, step)
            least, step = part.rows[:, row, None]
            plain = decoded(unpacked(part.values[at], bits, value.shape[-1]), least, step)
            value[here] = (plain.float() * self.factor[own].float()).to(value.dtype)
        return key, value

    def keep(self, slots: Tensor, content: tuple[Tensor, Tensor] | None = None) -> "SalientBody":
        """The first tokens keep their codes; any others are rounded again, with the bits they have."""
        salient, m = self.salient(), slots.shape[1]
        positions = _alike(self.positions.expand(len(salient), -1).gather(1, slots))
        if content is not None or not bool((slots == torch.arange(m, device=slots.device)).all()):
            return encode(
                *(self.read(slots) if content is None else content), salient.gather(1, slots), positions, self.bits
            )
        here = salient[:, :m]
        parts = []
        for part, of, kept in ((self.high, salient, here), (self.low, ~salient, ~here)):
            index = torch.nn.functional.pad(kept, (0, of.shape[1] - m))[of]
            rows = int(kept.sum(1).max()) if m else 0
            parts.append(Part(part.keys[index], part.values[index], part.channels, part.rows[:, :rows].clone()))
        return SalientBody(self.bits, parts[0], parts[1], _marks(here), self.factor, positions)


def encode(key: Tensor, value: Tensor, salient: Tensor, positions: Tensor, bits: Bits) -> SalientBody:
    """The body of tokens ``key`` [h, n, d] and ``value`` [h, n, dv], of which ``salient`` [h, n] are that."""
    factor = value.float().abs().amax(1).sqrt()
    factor = torch.where(factor > 0, factor, torch.ones_like(factor)).to(value.dtype)
    plain = value.float() / factor[:, None].float()
    high = _part(key, plain, salient, bits.high)
    low = _part(key, plain, ~salient, bits.low)
    return SalientBody(bits, high, low, _marks(salient), factor, _alike(positions))


def _part(key: Tensor, plain: Tensor, which: Tensor, bits: int) -> Part:
    infinite = torch.full((), float("inf"), device=key.device)
    some, mask = key.float(), which[..., None]
    channels = span(
        torch.where(mask, some, infinite).amin(1), torch.where(mask, some, -infinite).amax(1), bits, key.dtype
    )
    counts = which.sum(1)
    head, _ = which.nonzero().unbind(1)
    rank = (which.cumsum(1) - 1)[which]
    # The i-th tokens of all heads share what is kept of a row: they need not be the same token.
    least = plain[which].amin(1), plain[which].amax(1)
    rows = int(counts.max())
    low, high = (torch.full((rows,), sign * float("inf"), device=key.device) for sign in (1, -1))
    low.scatter_reduce_(0, rank, least[0], "amin")
    high.scatter_reduce_(0, rank, least[1], "amax")
    spans = span(low, high, bits, key.dtype)
    keys = coded(some[which], channels[0, head].float(), channels[1, head].float(), bits)
    values = coded(plain[which], spans[0, rank, None].float(), spans[1, rank, None].float(), bits)
    return Part(packed(keys, bits), packed(values, bits), channels, spans)


def _marks(salient: Tensor) -> Tensor:
    eights = torch.nn.functional.pad(salient, (0, -salient.shape[1] % 8)).view(len(salient), -1, 8)
    bit = torch.arange(8, dtype=torch.uint8, device=salient.device)
    return (eights.to(torch.uint8) << bit).sum(-1, dtype=torch.uint8)


def _alike(positions: Tensor) -> Tensor:
    """Once for all key heads where these hold the same tokens."""
    same = len(positions) > 1 and bool((positions == positions[:1]).all())
    return positions[:1].clone() if same else positions
