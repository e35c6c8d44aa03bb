"""Keys and values in a few bits: the law of the codes and of the bytes they become, in short torch.

A group of numbers x is kept as its minimum m, a scale s = (max - m) / (2^bits - 1) and codes round((x - m) / s), halves
to even, clamped before they are rounded. Every step is rounded to the dtype of x, and so are s and m. It decodes to
code * s + m; where s is 0, to m. Keys form groups of consecutive tokens of one channel, values groups of consecutive
channels of one token (the quantiser of KIVI, Liu et al. 2024, arXiv 2402.02750). Keys ``by_token`` form groups as
values do, so that they can be packed one by one.

**Bytes.** A page holds ``PACKED`` tokens: codes, then all scales, then all minima. Codes lie in rows of 64 bytes, which
are sixteen 32-bit words of 32 / bits steps each: steps 0, 2, 4, ... from the lowest bit of a word upwards, steps 1, 3,
5, ... from its bit 16. Keys: rows [token / 16][channel / steps], a word per token; scales [token / group][channel].
Values: rows [channel / 16][token / steps], a word per channel; scales [channel / group][token], and so those of keys by
token. Channels are filled up to a multiple of 16.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PACKED = 128
BITS = (2, 4, 8)
GROUP_SIZES = (32, 64, 128)
_LANES = 16


@dataclass(frozen=True)
class Packing:
    """Form of the keys or values of one layer: heads of ``dim`` channels, groups of ``group_size`` numbers."""

    bits: int
    group_size: int
    dim: int
    dtype: torch.dtype
    are_keys: bool
    by_token: bool = False
    # Which share of the way from 0 to a group's minimum and maximum the steps span, of which one is at 0 (the quantiser
    # of RotateKV); None: from the minimum to the maximum. Only the law packs so; all decode it.
    clip: float | None = None

    @property
    def steps(self) -> int:
        """Codes in a 32-bit word."""
        return 32 // self.bits

    @cached_property
    def width(self) -> int:
        """Channels, filled up."""
        return -(-self.dim // _LANES) * _LANES

    @cached_property
    def code_bytes(self) -> int:
        return PACKED * self.width * self.bits // 8

    @cached_property
    def scales(self) -> tuple[int, int]:
        """Shape of the scales of a page."""
        by_channel = self.are_keys and not self.by_token
        return (PACKED // self.group_size, self.width) if by_channel else (-(-self.width // self.group_size), PACKED)

    @cached_property
    def scale_count(self) -> int:
        """Scales in a page; there are as many minima."""
        return self.scales[0] * self.scales[1]

    @cached_property
    def page_bytes(self) -> int:
        return self.code_bytes + 2 * self.scale_count * self.dtype.itemsize


def quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., n] uint8, scale and minimum [..., 1] of groups ``x`` [..., n]."""
    top = (1 << bits) - 1
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    # The span of numbers that a dtype can hold may be one that it cannot.
    span = (most - least).clamp(max=torch.finfo(x.dtype).max)
    # By a tensor: for a number, torch on a GPU multiplies with the reciprocal, which rounds otherwise.
    scale = span / torch.full_like(span, top)
    steps = (x - least) / torch.where(scale > 0, scale, torch.ones_like(scale))
    return steps.clamp(0, top).round().to(torch.uint8), scale, least


def quantise_clipped(x: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """As ``quantise``, between ``clip`` times the extremes of each group, in steps of which one is at 0: codes are
    round(x / s) + z with z = round(-minimum / s), and the minimum that is kept is -z * s. Where s is 0, a group decodes
    to its minimum."""
    top = (1 << bits) - 1
    least, most = x.float().amin(-1, keepdim=True), x.float().amax(-1, keepdim=True)
    largest = min(torch.finfo(x.dtype).max, torch.finfo(torch.float32).max)
    scale = ((most - least) * clip / top).clamp(max=largest).to(x.dtype).float()
    steps = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round(-least * clip / steps)
    codes = (torch.round(x.float() / steps) + zero).clamp(0, top)
    kept = torch.where(scale > 0, -zero * scale, least)
    return codes.to(torch.uint8), scale.to(x.dtype), kept.to(x.dtype)


def dequantise(codes: Tensor, scale: Tensor, least: Tensor) -> Tensor:
    """The numbers that codes stand for, rounded once to the dtype of the scales."""
    return (codes.float() * scale.float() + least.float()).to(scale.dtype)


def _quantised(x: Tensor, bits: int, clip: float | None) -> tuple[Tensor, Tensor, Tensor]:
    return quantise(x, bits) if clip is None else quantise_clipped(x, bits, clip)


def quantise_keys(keys: Tensor, bits: int, group_size: int, clip: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., n, d], scales and minima [..., n / group, d] of ``keys`` [..., n, d]."""
    *rest, n, d = keys.shape
    grouped = keys.reshape(*rest, n // group_size, group_size, d).transpose(-1, -2)
    codes, scale, least = _quantised(grouped, bits, clip)
    return codes.transpose(-1, -2).reshape(keys.shape), scale[..., 0], least[..., 0]


def quantise_values(
    values: Tensor, bits: int, group_size: int, clip: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [..., n, d], scales and minima [..., n, ceil(d / group)] of ``values`` [..., n, d]; the last group may be
    shorter."""
    parts = [_quantised(part, bits, clip) for part in torch.split(values, group_size, dim=-1)]
    codes, scale, least = zip(*parts, strict=True)
    return torch.cat(codes, dim=-1), torch.cat(scale, dim=-1), torch.cat(least, dim=-1)


def _filled(x: Tensor, form: Packing) -> Tensor:
    return torch.nn.functional.pad(x, (0, form.width - form.dim))


def _parts(pages: Tensor, form: Packing) -> tuple[Tensor, Tensor, Tensor]:
    """Views of pages [p, bytes]: words int32 [p, rows, 16], scales and minima [p, *form.scales]."""
    words = pages[:, : form.code_bytes].view(torch.int32).view(len(pages), -1, _LANES)
    params = pages[:, form.code_bytes :].view(form.dtype).view(len(pages), 2, *form.scales)
    return words, params[:, 0], params[:, 1]


def _shifts(form: Packing) -> Tensor:
    """The bit at which each step begins in its word."""
    step = torch.arange(form.steps)
    return 16 * (step % 2) + form.bits * (step // 2)


def pack(x: Tensor, pages: Tensor, form: Packing, slots: Tensor) -> None:
    """Writes tokens ``x`` [m, d] to pool ``slots`` int64 [m] (page * PACKED + place) of ``pages`` uint8 [p, bytes].

    Keys come in whole groups, side by side in their pages, unless they are packed by token.
    """
    if len(slots) == 0:
        return
    words, scales, minima = _parts(pages, form)
    page, place = slots // PACKED, slots % PACKED
    shifts = _shifts(form).to(x.device)
    if form.are_keys:
        if form.by_token:
            codes, scale, least = quantise_values(_filled(x, form), form.bits, form.group_size, form.clip)
            scales[page, :, place], minima[page, :, place] = scale, least
        else:
            codes, scale, least = quantise_keys(_filled(x, form), form.bits, form.group_size, form.clip)
            first = slots[:: form.group_size]
            scales[first // PACKED, first % PACKED // form.group_size] = scale
            minima[first // PACKED, first % PACKED // form.group_size] = least
        steps = codes.view(len(slots), -1, form.steps).long() << shifts
        rows = form.width // form.steps
        row = (place // _LANES * rows)[:, None] + torch.arange(rows, device=x.device)
        words[page[:, None], row, (place % _LANES)[:, None]] = _as_words(steps.sum(-1))
        return
    codes, scale, least = quantise_values(x, form.bits, form.group_size, form.clip)
    codes = _filled(codes, form)
    scales[page, :, place], minima[page, :, place] = scale, least
    tiles = torch.arange(form.width // _LANES, device=x.device) * (PACKED // form.steps)
    row = tiles + (place // form.steps)[:, None]
    mask = (1 << form.bits) - 1
    for step in range(form.steps):
        # Tokens of one word take turns.
        at = place % form.steps == step
        where = page[at, None], row[at]
        code = codes[at].view(-1, form.width // _LANES, _LANES).long() << shifts[step]
        words[where] = _as_words((words[where].long() & ~(mask << int(shifts[step]))) | code)


def erase(form: Packing, page: Tensor, first: int) -> None:
    """Makes zeros of what a page uint8 [bytes] holds of tokens from ``first`` on. Scales and minima of groups of keys
    that begin before ``first`` stay."""
    words, *params = (part[0] for part in _parts(page[None], form))
    if form.are_keys:
        tile = first // _LANES
        by_tile = words.view(PACKED // _LANES, -1, _LANES)
        by_tile[tile, :, first % _LANES :] = 0
        by_tile[tile + 1 :] = 0
    else:
        by_word = words.view(-1, PACKED // form.steps, _LANES)
        word, step = divmod(first, form.steps)
        kept = ((1 << form.bits) - 1) << _shifts(form)[:step]
        by_word[:, word] &= int(_as_words(kept.sum()))
        by_word[:, word + 1 :] = 0
    for part in params:
        if form.are_keys and not form.by_token:
            part[-(-first // form.group_size) :] = 0
        else:
            part[:, first:] = 0


def _as_words(bits: Tensor) -> Tensor:
    """The lowest 32 bits of int64 as int32."""
    low = bits & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)


def codes_of(pages: Tensor, form: Packing, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [m, d] of the tokens at pool ``slots`` [m], with the scale and the minimum [m, d] of each."""
    words, scales, minima = _parts(pages, form)
    page, place = slots // PACKED, slots % PACKED
    shifts, mask = _shifts(form).to(pages.device), (1 << form.bits) - 1
    if form.are_keys:
        rows = form.width // form.steps
        row = (place // _LANES * rows)[:, None] + torch.arange(rows, device=pages.device)
        held = words[page[:, None], row, (place % _LANES)[:, None]]
        codes = (held[..., None] >> shifts) & mask
    else:
        tiles = torch.arange(form.width // _LANES, device=pages.device) * (PACKED // form.steps)
        held = words[page[:, None], tiles + (place // form.steps)[:, None]]
        codes = (held >> shifts[place % form.steps][:, None, None]) & mask
    if form.are_keys and not form.by_token:
        scale, least = scales[page, place // form.group_size], minima[page, place // form.group_size]
    else:
        channel = torch.arange(form.width, device=pages.device) // form.group_size
        where = page[:, None], channel, place[:, None]
        scale, least = scales[where], minima[where]
    codes = codes.reshape(len(slots), form.width).to(torch.uint8)
    return codes[:, : form.dim], scale[:, : form.dim], least[:, : form.dim]


def unpack(pages: Tensor, form: Packing, slots: Tensor) -> Tensor:
    """Tokens [m, d] at pool ``slots`` [m], as they decode."""
    return dequantise(*codes_of(pages, form, slots))
