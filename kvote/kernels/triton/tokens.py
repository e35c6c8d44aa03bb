"""Tokens on their way into pages and out of them: append, gather with rotation, rotation alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvote.kernels import checks
from kvote.kernels.contract import Angles
from kvote.kernels.lanes import PAGE, Lanes
from kvote.kernels.triton.common import at_home, fetched, integers, padded, partners, rotated, rows_of, table
from kvote.kernels.triton.sketch import centres, encode_rows, sketch_views
from kvote.kernels.triton.sketch import sketch as sketch_lanes

_BLOCK = 16


@triton.jit(do_not_specialize=("position_sequence", "kv_heads", "table_width", "first", "count"))
def _append(
    key,
    value,
    positions,
    keys,
    values,
    slot_positions,
    codes,
    scales,
    pages,
    centres,
    firsts,
    key_sequence,
    key_head,
    key_token,
    value_sequence,
    value_head,
    value_token,
    position_sequence,
    kv_heads,
    table_width,
    first,
    count,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    SP: tl.constexpr,
    BITS: tl.constexpr,
    RAGGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token, lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    sequence, head = lane // kv_heads, lane % kv_heads
    held = token < count
    if RAGGED:
        begin = tl.load(firsts + lane)
    else:
        begin = first
    slots = rows_of(pages + lane * table_width, begin + token, held)
    far = token.to(tl.int64)[:, None]
    channels, value_channels = tl.arange(0, DP), tl.arange(0, DVP)
    rows = key + sequence * key_sequence + head * key_head + far * key_token
    mask = held[:, None] & (channels < D)[None, :]
    moved = tl.load(rows + channels[None, :], mask=mask)
    tl.store(keys + slots[:, None] * D + channels[None, :], moved, mask=mask)
    value_rows = value + sequence * value_sequence + head * value_head + far * value_token
    mask = held[:, None] & (value_channels < DV)[None, :]
    moved = tl.load(value_rows + value_channels[None, :], mask=mask)
    tl.store(values + slots[:, None] * DV + value_channels[None, :], moved, mask=mask)
    place = tl.load(positions + sequence * position_sequence + token, mask=held, other=0)
    tl.store(slot_positions + slots, place.to(tl.int32), mask=held)
    if BITS > 0:
        # From the rows given, not from the pool: nothing has to wait for what was just written.
        encode_rows(rows, codes, scales, slots, held, centres + lane * D, D, SP, BITS)


@at_home
def append(
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    pools: tuple[Tensor, Tensor, Tensor],
    lanes: Lanes,
    first: Sequence[int],
    sketch: Tensor | None,
    bits: int,
) -> None:
    """As in the contract: tokens [sequences, h, t, d] and [sequences, h, t, dv] with ``positions`` [sequences, t] go
    behind the first ``first[lane]`` tokens of each lane, and are sketched."""
    checks.appending(key, value, positions, pools, lanes, first)
    _, heads, count, dim = key.shape
    keys, values, slot_positions = pools
    pages = table(lanes, key.device)
    ragged = any(at != first[0] for at in first)
    codes, scales = sketch_views(sketch, bits) if sketch is not None else (keys, keys)
    bits = bits if sketch is not None else 0
    _append[(-(-count // _BLOCK), lanes.count)](
        key,
        value,
        positions,
        keys,
        values,
        slot_positions,
        codes,
        scales,
        pages,
        # Of lanes whose first page is full before; those of others follow below.
        pages if sketch is None else centres(keys, pages, first),
        integers(first, key.device) if ragged else pages,
        *key.stride()[:3],
        *value.stride()[:3],
        positions.stride(0),
        heads,
        pages.shape[1],
        first[0],
        count,
        D=dim,
        DP=padded(dim),
        DV=value.shape[3],
        DVP=padded(value.shape[3]),
        SP=padded(dim * bits // 8) if bits else 16,
        BITS=bits,
        RAGGED=ragged,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    if sketch is not None and min(first) < PAGE:
        if not ragged:
            sketch_lanes(keys, sketch, bits, lanes, 0, first[0] + count)
            return
        for i, at in enumerate(first):
            if at < PAGE:
                sketch_lanes(keys, sketch, bits, lanes.only(i), 0, at + count)


@triton.jit(do_not_specialize=("kv_heads", "table_width", "lists", "count", "angle_rows", "pairs"))
def _gather(
    keys,
    values,
    pages,
    index,
    cos,
    sin,
    key_out,
    value_out,
    kv_heads,
    table_width,
    lists,
    count,
    angle_rows,
    pairs,
    D: tl.constexpr,
    DP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place, head = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    line = tl.program_id(2).to(tl.int64)
    lane = line // lists * kv_heads + head
    held, channels = place < count, tl.arange(0, DP)
    token = tl.load(index + line * count + place, mask=held, other=0).to(tl.int32)
    slots = rows_of(pages + lane * table_width, token, held)
    key = fetched(keys, slots, channels, held, D, DP)
    partner, _, _ = partners(channels, pairs, INTERLEAVED)
    other = fetched(keys, slots, partner, held, D, DP)
    key = rotated(key, other, cos, sin, line * angle_rows + place, held, channels, pairs, INTERLEAVED).to(key.dtype)
    out = ((line * kv_heads + head) * count + place)[:, None] * D + channels[None, :]
    mask = held[:, None] & (channels < D)[None, :]
    tl.store(key_out + out, key, mask=mask)
    tl.store(value_out + out, fetched(values, slots, channels, held, D, DP), mask=mask)


@at_home
def gather(
    keys: Tensor,
    values: Tensor,
    lanes: Lanes,
    index: Tensor,
    angles: Angles,
    interleaved: bool,
    out: tuple[Tensor, Tensor],
) -> None:
    """As in the contract: the tokens ``index`` [m] of one sequence go to ``out`` [h, m, d] each, or those of q lists of
    each of b sequences, ``index`` [b, q, m], to [b, q, h, m, d]; keys are rotated by ``angles`` [m, r], or [b, q, m, r]
    where each list has its own."""
    checks.gathering(keys, values, index, out, angles)
    b, q, m = index.shape if index.dim() == 3 else (1, 1, len(index))
    cos, sin = (a.float().contiguous() for a in angles)
    pages, heads = table(lanes, keys.device), lanes.count // b
    _gather[(-(-m // _BLOCK), heads, b * q)](
        keys,
        values,
        pages,
        index,
        cos,
        sin,
        *out,
        heads,
        pages.shape[1],
        q,
        m,
        m if cos.dim() > 2 else 0,
        cos.shape[-1],
        D=keys.shape[-1],
        DP=padded(keys.shape[-1]),
        INTERLEAVED=interleaved,
        BLOCK=_BLOCK,
        num_warps=4,
    )


@triton.jit(do_not_specialize=("heads", "count", "angle_rows", "pairs"))
def _rotate(
    x,
    cos,
    sin,
    out,
    x_sequence,
    x_head,
    x_token,
    heads,
    count,
    angle_rows,
    pairs,
    D: tl.constexpr,
    DP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One axis for all: the others end at 65,535, and a few thousand queries that select alone have more heads.
    blocks = tl.cdiv(count, BLOCK)
    place, line = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK), (tl.program_id(0) // blocks).to(tl.int64)
    sequence, head = line // heads, line % heads
    held, channels = place < count, tl.arange(0, DP)
    rows = x + sequence * x_sequence + head * x_head + place.to(tl.int64)[:, None] * x_token
    mask = held[:, None] & (channels < D)[None, :]
    own = tl.load(rows + channels[None, :], mask=mask, other=0.0)
    partner, _, _ = partners(channels, pairs, INTERLEAVED)
    other = tl.load(rows + partner[None, :], mask=mask, other=0.0)
    spots = sequence * angle_rows + place
    done = rotated(own, other, cos, sin, spots, held, channels, pairs, INTERLEAVED)
    tl.store(out + (line * count + place)[:, None] * D + channels[None, :], done.to(own.dtype), mask=mask)


@at_home
def rotate(x: Tensor, angles: Angles, interleaved: bool) -> Tensor:
    """As in the contract: ``x`` [sequences, heads, n, d], channels contiguous, rotated by float32 ``angles``
    [n, r] or [sequences or 1, n, r]."""
    checks.rotation(x, angles)
    sequences, heads, count, dim = x.shape
    cos, sin = angles
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        _rotate[(-(-count // _BLOCK) * sequences * heads,)](
            x,
            cos,
            sin,
            out,
            *x.stride()[:3],
            heads,
            count,
            count if cos.dim() == 3 and cos.shape[0] > 1 else 0,
            cos.shape[-1],
            D=dim,
            DP=padded(dim),
            INTERLEAVED=interleaved,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return out
