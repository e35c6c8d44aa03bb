"""Sketches of keys for a GPU: codes of 8 or 4 bits with one half-precision scale per token (``reference.sketched``).

**Bytes of a page** of 64 tokens: the codes token by token, then 64 scales. 8-bit codes are signed bytes, one per
channel. 4-bit codes hold channel i of the first half of a token's channels in the lower half of byte i and the same
channel of the second half above it, so that no byte has to be taken apart across threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvote.kernels import checks
from kvote.kernels.lanes import Lanes
from kvote.kernels.law import centre
from kvote.kernels.triton.common import PAGE, at_home, padded, rows_of, table

SKETCH_TOKENS = PAGE
_PAGE = tl.constexpr(PAGE)


def sketch_bytes(dim: int, bits: int) -> int:
    """Bytes of the sketch of ``SKETCH_TOKENS`` tokens: codes of ``bits`` and one half-precision scale each."""
    return SKETCH_TOKENS * (dim * bits // 8 + 2)


def sketch_views(sketch: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The bytes [pages, bytes] as codes (signed where they have 8 bits) and as half-precision numbers."""
    return sketch.view(torch.int8) if bits == 8 else sketch, sketch.view(torch.float16)


@triton.jit
def codes_of(codes, slots, held, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """Codes about zero [tokens, DP] as bfloat16, which holds them exactly: all channels, or those of each half."""
    WIDTH: tl.constexpr = D * BITS // 8
    channels = tl.arange(0, DP)
    page = slots // _PAGE
    places = codes + (page * (_PAGE * (WIDTH + 2)) + slots % _PAGE * WIDTH)[:, None] + channels[None, :]
    if DP == WIDTH:
        raw = tl.load(places, mask=held[:, None], other=0)
    else:
        raw = tl.load(places, mask=held[:, None] & (channels < WIDTH)[None, :], other=0)
    if BITS == 8:
        code = raw.to(tl.float32).to(tl.bfloat16)
        return code, code
    else:
        low = ((raw & 15).to(tl.float32) - 7.5).to(tl.bfloat16)
        high = ((raw >> 4).to(tl.float32) - 7.5).to(tl.bfloat16)
        return low, high


@triton.jit
def scales_of(scales, slots, held, D: tl.constexpr, BITS: tl.constexpr):
    """The scale of each token, float32."""
    WIDTH: tl.constexpr = D * BITS // 8
    page = slots // _PAGE
    # Counted in half-precision numbers.
    return tl.load(
        scales + page * (_PAGE * (WIDTH + 2) // 2) + _PAGE * WIDTH // 2 + slots % _PAGE, mask=held, other=0.0
    ).to(tl.float32)


@triton.jit
def encode(first, second, codes, scales, slots, held, channels, D: tl.constexpr, BITS: tl.constexpr):
    """Writes the sketches of tokens: ``first`` [tokens, channels] are all channels, or with 4 bits those of the first
    half, and ``second`` those of the second; what is behind the last channel is 0."""
    # Divisions are rounded as the law rounds them. What ``/`` compiles to is off by a bit or two, and of 16-bit keys
    # many lie exactly midway between two codes.
    WIDTH: tl.constexpr = D * BITS // 8
    page = slots // _PAGE
    places = codes + (page * (_PAGE * (WIDTH + 2)) + slots % _PAGE * WIDTH)[:, None] + channels[None, :]
    mask = held[:, None] & (channels < WIDTH)[None, :]
    largest = tl.max(tl.abs(first), 1)
    if BITS == 8:
        scale = tl.div_rn(largest, 127.0).to(tl.float16).to(tl.float32)
    else:
        largest = tl.maximum(largest, tl.max(tl.abs(second), 1))
        scale = tl.div_rn(largest, 7.5).to(tl.float16).to(tl.float32)
    divisor = tl.where(scale > 0, scale, 1.0)[:, None]
    if BITS == 8:
        code = tl.where(scale[:, None] > 0, tl.div_rn(first, divisor), 0.0)
        code = tl.floor(tl.minimum(tl.maximum(code, -127.0), 127.0) + 0.5)
        tl.store(places, code.to(tl.int32).to(tl.int8), mask=mask)
    else:
        low = tl.where(scale[:, None] > 0, tl.div_rn(first, divisor), 0.0)
        high = tl.where(scale[:, None] > 0, tl.div_rn(second, divisor), 0.0)
        low = tl.floor(tl.minimum(tl.maximum(low, -7.5), 7.5) + 8.0).to(tl.int32)
        high = tl.floor(tl.minimum(tl.maximum(high, -7.5), 7.5) + 8.0).to(tl.int32)
        tl.store(places, (low | (high << 4)).to(tl.uint8), mask=mask)
    spots = scales + page * (_PAGE * (WIDTH + 2) // 2) + _PAGE * WIDTH // 2 + slots % _PAGE
    tl.store(spots, scale.to(tl.float16), mask=held)


@triton.jit(do_not_specialize=("table_width", "start", "stop"))
def _sketch(
    keys,
    codes,
    scales,
    pages,
    centres,
    table_width,
    start,
    stop,
    D: tl.constexpr,
    DP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, lane = start + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    held = token < stop
    slot = rows_of(pages + lane * table_width, token, held)
    encode_rows(keys + slot[:, None] * D, codes, scales, slot, held, centres + lane * D, D, DP, BITS)


@triton.jit
def encode_rows(rows, codes, scales, slot, held, centre, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """Sketches keys whose first channels lie at ``rows`` [tokens, 1], less ``centre`` [d]."""
    WIDTH: tl.constexpr = D * BITS // 8
    channels = tl.arange(0, DP)
    mask = held[:, None] & (channels < WIDTH)[None, :]
    held_channels = channels < WIDTH
    first = tl.load(rows + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    first -= tl.load(centre + channels, mask=held_channels, other=0.0)[None, :]
    if BITS == 4:
        second = tl.load(rows + WIDTH + channels[None, :], mask=mask, other=0.0).to(tl.float32)
        second -= tl.load(centre + WIDTH + channels, mask=held_channels, other=0.0)[None, :]
    else:
        second = first
    encode(first, second, codes, scales, slot, held, channels, D, BITS)


@at_home
def sketch(keys: Tensor, sketch: Tensor, bits: int, lanes: Lanes, start: int, stop: int) -> None:
    """As in the contract: tokens ``start`` to ``stop`` of lanes, all that they hold, go from ``keys`` [pages, PAGE, d]
    into ``sketch``, less the centre of their lane."""
    dim, block = keys.shape[-1], 16
    checks.sketching(keys, sketch, start, stop)
    if start == stop:
        return
    codes, scales = sketch_views(sketch, bits)
    pages = table(lanes, keys.device)
    _sketch[(-(-(stop - start) // block), lanes.count)](
        keys,
        codes,
        scales,
        pages,
        centres(keys, pages, [stop] * lanes.count),
        pages.shape[1],
        start,
        stop,
        D=dim,
        DP=padded(dim * bits // 8),
        BITS=bits,
        BLOCK=block,
        num_warps=4,
    )


def centres(keys: Tensor, pages: Tensor, held: Sequence[int]) -> Tensor:
    """The centre [lanes, d] of each lane of so many tokens (``reference.centre``), by the table of its ``pages``."""
    if max(held) < PAGE:
        return keys.new_zeros(len(held), keys.shape[-1], dtype=torch.float32)
    means = centre(keys[pages[:, 0].long()], PAGE)[:, 0]
    if min(held) < PAGE:
        means[torch.tensor(held, device=means.device) < PAGE] = 0
    return means.contiguous()
