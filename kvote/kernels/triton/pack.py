"""Tokens packed into codes on a GPU, and decoded out of them. Contracts as in ``kvote.kernels.contract``, layout and
law in ``kvote.kernels.packing``.

Every step of the quantiser is rounded as the law rounds it: to the dtype of the model, divisions as IEEE 754 says and
not as ``/`` compiles, products and sums apart from each other. A number next to the middle between two codes would
otherwise get either.

A word of keys belongs to one token, and a word of values to as many tokens as it has steps. So programs that write
values begin where a word does: no two write the same one, and what lies in it of other tokens stays.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvote.kernels import checks
from kvote.kernels.lanes import Lanes
from kvote.kernels.packing import PACKED, Packing
from kvote.kernels.triton.common import at_home, integers, padded, rounded, table

_PACKED = tl.constexpr(PACKED)
# Words in a row of codes.
_LANES = tl.constexpr(16)
# Tokens at a time; no word holds more. Numbers of a group of keys and its neighbours that one program holds.
_BLOCK, _HELD = 16, 4096


@triton.jit
def _quantised(x, there, pool, BITS: tl.constexpr, MOST: tl.constexpr, AXIS: tl.constexpr):
    """Codes int32, scales and minima float32 of groups along an axis of float32 ``x``, of numbers that are ``there``;
    rounded to the dtype of ``pool``, whose largest number is ``MOST``."""
    TOP: tl.constexpr = (1 << BITS) - 1
    least = tl.min(tl.where(there, x, float("inf")), AXIS, keep_dims=True)
    span = tl.max(tl.where(there, x, float("-inf")), AXIS, keep_dims=True) - least
    # Minima and maxima of the law are NaN where a number is, those of Triton are not.
    wrong = tl.max((there & (x != x)).to(tl.int32), AXIS, keep_dims=True) > 0
    least, span = tl.where(wrong, float("nan"), least), rounded(tl.where(wrong, float("nan"), span), pool)
    scale = rounded(tl.div_rn(tl.where(span > MOST, MOST, span), TOP * 1.0), pool)
    steps = rounded(tl.div_rn(rounded(x - least, pool), tl.where(scale > 0, scale, 1.0)), pool)
    # NaN becomes 0. The last bits of 2^23 plus a number are that number, rounded to a whole one, halves to even.
    steps = tl.minimum(tl.maximum(steps, 0.0), TOP * 1.0) + 8388608.0
    return steps.to(tl.int32, bitcast=True) & TOP, scale, least


@triton.jit
def _shifts(BITS: tl.constexpr):
    """The bit at which each step begins in its word."""
    step = tl.arange(0, 32 // BITS)
    return 16 * (step % 2) + BITS * (step // 2)


@triton.jit(do_not_specialize=("table_width", "first"))
def _pack_groups(
    x,
    words,
    scales,
    pages,
    firsts,
    x_lane,
    x_token,
    table_width,
    first,
    D: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    COUNT: tl.constexpr,
    MOST: tl.constexpr,
    RAGGED: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # A group of tokens, some channels of it.
    SIZE: tl.constexpr = scales.dtype.element_ty.primitive_bitwidth // 8
    STEPS: tl.constexpr = 32 // BITS
    BYTES: tl.constexpr = CODES + 2 * COUNT * SIZE
    group, lane = tl.program_id(0), tl.program_id(2).to(tl.int64)
    channel, token = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, GROUP)
    if RAGGED:
        begin = tl.load(firsts + lane) + group * GROUP
    else:
        begin = first + group * GROUP
    page = tl.load(pages + lane * table_width + begin // _PACKED).to(tl.int64)
    place, there = begin % _PACKED + token, (channel < D)[None, :]
    rows = x + lane * x_lane + (group.to(tl.int64) * GROUP + token)[:, None] * x_token
    given = tl.load(rows + channel[None, :], mask=there, other=0.0).to(tl.float32)
    code, scale, least = _quantised(given, there, scales, BITS, MOST, 0)
    held = tl.sum(tl.reshape(code, [GROUP, CHANNELS // STEPS, STEPS]) << _shifts(BITS)[None, None, :], 2)
    word = tl.program_id(1) * (CHANNELS // STEPS) + tl.arange(0, CHANNELS // STEPS)
    spots = (place // _LANES * (D // STEPS))[:, None] * _LANES + word[None, :] * _LANES + (place % _LANES)[:, None]
    tl.store(words + page * (BYTES // 4) + spots, held, mask=(word < D // STEPS)[None, :])
    spots = scales + page * (BYTES // SIZE) + CODES // SIZE + begin % _PACKED // GROUP * D + channel[None, :]
    tl.store(spots, scale.to(scales.dtype.element_ty), mask=there)
    tl.store(spots + COUNT, least.to(scales.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=("table_width", "first", "count"))
def _pack_tokens(
    x,
    words,
    scales,
    pages,
    firsts,
    x_lane,
    x_token,
    table_width,
    first,
    count,
    D: tl.constexpr,
    DP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    COUNT: tl.constexpr,
    MOST: tl.constexpr,
    ARE_KEYS: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Values, or keys by token: a block of tokens with all their channels.
    SIZE: tl.constexpr = scales.dtype.element_ty.primitive_bitwidth // 8
    STEPS: tl.constexpr = 32 // BITS
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    BYTES: tl.constexpr = CODES + 2 * COUNT * SIZE
    SPANS: tl.constexpr = DP // GROUP if GROUP < DP else 1
    lane = tl.program_id(1).to(tl.int64)
    if RAGGED:
        begin = tl.load(firsts + lane)
    else:
        begin = first
    start = begin // BLOCK * BLOCK + tl.program_id(0) * BLOCK
    token, channel = start + tl.arange(0, BLOCK), tl.arange(0, DP)
    held = (token >= begin) & (token < begin + count)
    page = tl.load(pages + lane * table_width + start // _PACKED, mask=start < begin + count, other=0).to(tl.int64)
    place, there = token % _PACKED, (channel < D)[None, :]
    rows = x + lane * x_lane + (token - begin).to(tl.int64)[:, None] * x_token
    given = tl.load(rows + channel[None, :], mask=held[:, None] & there, other=0.0).to(tl.float32)
    grouped = tl.reshape(given, [BLOCK, SPANS, DP // SPANS])
    code, scale, least = _quantised(grouped, tl.reshape(channel, [1, SPANS, DP // SPANS]) < D, scales, BITS, MOST, 2)
    code, words = tl.reshape(code, [BLOCK, DP]), words + page * (BYTES // 4)
    if ARE_KEYS:
        word = tl.arange(0, DP // STEPS)
        fresh = tl.sum(tl.reshape(code, [BLOCK, DP // STEPS, STEPS]) << _shifts(BITS)[None, None, :], 2)
        spots = (place // _LANES * (D // STEPS))[:, None] * _LANES + word[None, :] * _LANES + (place % _LANES)[:, None]
        tl.store(words + spots, fresh, mask=held[:, None] & (word < D // STEPS)[None, :])
    else:
        shifts = _shifts(BITS)
        ours = tl.sum(tl.reshape(tl.where(held, (1 << BITS) - 1, 0), [BLOCK // STEPS, STEPS]) << shifts[None, :], 1)
        code = tl.reshape(tl.where(held[:, None], code, 0), [BLOCK // STEPS, STEPS, DP])
        fresh = tl.sum(code << shifts[None, :, None], 1)
        run = start % _PACKED // STEPS + tl.arange(0, BLOCK // STEPS)
        spots = (channel // _LANES * (_PACKED // STEPS))[None, :] + run[:, None]
        spots = words + spots * _LANES + (channel % _LANES)[None, :]
        # Of a word that is filled at once, nothing stays.
        old = tl.load(spots, mask=there & ((ours != 0) & (ours != -1))[:, None], other=0)
        tl.store(spots, (old & ~ours[:, None]) | fresh, mask=there & (ours != 0)[:, None])
    span = tl.arange(0, SPANS)
    spots = scales + page * (BYTES // SIZE) + CODES // SIZE + span[None, :] * _PACKED + place[:, None]
    mask = held[:, None] & (span < GROUPS)[None, :]
    tl.store(spots, tl.reshape(scale, [BLOCK, SPANS]).to(scales.dtype.element_ty), mask=mask)
    tl.store(spots + COUNT, tl.reshape(least, [BLOCK, SPANS]).to(scales.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("table_width", "each", "start", "count"))
def _unpack(
    words,
    scales,
    pages,
    index,
    out,
    table_width,
    each,
    start,
    count,
    out_lane,
    D: tl.constexpr,
    DP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    COUNT: tl.constexpr,
    ARE_KEYS: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    LISTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SIZE: tl.constexpr = scales.dtype.element_ty.primitive_bitwidth // 8
    STEPS: tl.constexpr = 32 // BITS
    BYTES: tl.constexpr = CODES + 2 * COUNT * SIZE
    lane, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held, channel = at < count, tl.arange(0, DP)
    mask = held[:, None] & (channel < D)[None, :]
    if LISTED:
        token = tl.load(index + lane // each * count + at, mask=held, other=0).to(tl.int32)
    else:
        token = start + at
    page = tl.load(pages + lane * table_width + token // _PACKED, mask=held, other=0).to(tl.int64)[:, None]
    place, channel = (token % _PACKED)[:, None], channel[None, :]
    if ARE_KEYS:
        row, column, step = place // _LANES * (D // STEPS) + channel // STEPS, place % _LANES, channel % STEPS
    else:
        row, column, step = channel // _LANES * (_PACKED // STEPS) + place // STEPS, channel % _LANES, place % STEPS
    code = tl.load(words + page * (BYTES // 4) + row * _LANES + column, mask=mask, other=0)
    code = (code >> (16 * (step % 2) + BITS * (step // 2))) & ((1 << BITS) - 1)
    if BY_TOKEN:
        spots = channel // GROUP * _PACKED + place
    else:
        spots = place // GROUP * D + channel
    spots += page * (BYTES // SIZE) + CODES // SIZE
    scale = tl.load(scales + spots, mask=mask, other=0.0).to(tl.float32)
    least = tl.load(scales + spots + COUNT, mask=mask, other=0.0).to(tl.float32)
    decoded = rounded(code.to(tl.float32) * scale + least, scales)
    rows = out + lane * out_lane + at.to(tl.int64)[:, None] * D
    tl.store(rows + channel, decoded.to(scales.dtype.element_ty), mask=mask)


def pool(pages: Tensor, form: Packing, lanes: Lanes) -> tuple[Tensor, Tensor, Tensor]:
    """A pool as words and as scales, and its page table on the device."""
    checks.packed_pool(pages, form)
    return pages.view(torch.int32), pages.view(form.dtype), table(lanes, pages.device)


@at_home
def pack(x: Tensor, pages: Tensor, form: Packing, lanes: Lanes, first: Sequence[int]) -> None:
    """As in the contract: tokens ``x`` [lanes, m, d] go behind the first ``first[lane]`` tokens of each lane; keys
    in whole groups, unless they are packed by token. Raises ValueError for what would be written wrongly."""
    count, dim = x.shape[1:]
    checks.packing(x, form, lanes, first)
    alone = form.by_token or not form.are_keys
    words, scales, tables = pool(pages, form, lanes)
    if not x.numel():
        return
    begin = first[0]
    ragged = any(at != begin for at in first)
    given = x, words, scales, tables, integers(first, x.device) if ragged else tables, *x.stride()[:2], tables.shape[1]
    kind: dict[str, float] = {"D": dim, "BITS": form.bits, "GROUP": form.group_size, "RAGGED": ragged}
    kind |= {"CODES": form.code_bytes, "COUNT": form.scale_count, "MOST": torch.finfo(form.dtype).max}
    if alone:
        # Where lanes begin in different places of a block, some reach into one more.
        blocks = -(-(count + _BLOCK - 1) // _BLOCK) if ragged else -(-(begin % _BLOCK + count) // _BLOCK)
        _pack_tokens[(blocks, lanes.count)](
            *given,
            begin,
            count,
            **kind,
            DP=padded(dim),
            ARE_KEYS=form.are_keys,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
        return
    channels = min(padded(dim), _HELD // form.group_size)
    _pack_groups[(count // form.group_size, -(-dim // channels), lanes.count)](
        *given, begin, **kind, CHANNELS=channels, num_warps=4, enable_fp_fusion=False
    )


@at_home
def unpack(pages: Tensor, form: Packing, lanes: Lanes, tokens: Tensor | range, sequences: int, out: Tensor) -> None:
    """As in the contract: a range of tokens, or ``tokens`` int64 [sequences, m], of all lanes are decoded to
    ``out`` [lanes, >= m, d]. Raises ValueError for what would be read wrongly."""
    start, count = checks.tokens_of(tokens, sequences)
    checks.unpacking(out, form, lanes, count)
    words, scales, tables = pool(pages, form, lanes)
    if not count:
        return
    _unpack[(-(-count // _BLOCK), lanes.count)](
        words,
        scales,
        tables,
        tokens if isinstance(tokens, Tensor) else tables,
        out,
        tables.shape[1],
        lanes.count // sequences,
        start,
        count,
        out.stride(0),
        D=form.dim,
        DP=padded(form.dim),
        BITS=form.bits,
        GROUP=form.group_size,
        CODES=form.code_bytes,
        COUNT=form.scale_count,
        ARE_KEYS=form.are_keys,
        BY_TOKEN=form.by_token or not form.are_keys,
        LISTED=isinstance(tokens, Tensor),
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
