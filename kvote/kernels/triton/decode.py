"""Attention of one query position per sequence, read from the pages: split over the tokens, merged by log-sum-exp."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvote.kernels import checks
from kvote.kernels.contract import Angles
from kvote.kernels.lanes import Lanes
from kvote.kernels.triton.common import (
    PAGE,
    at_home,
    capped,
    fetched,
    padded,
    partners,
    product,
    put_part,
    rotated,
    rows_of,
    scarce,
    softened,
    split,
    table,
)
from kvote.kernels.triton.merge import merge_parts

MAX_QUERIES_PER_KV = 64


@triton.jit(
    do_not_specialize=("kv_heads", "sharing", "table_width", "start", "count", "each", "parts_before", "slots", "pairs")
)
def _decode(
    query,
    keys,
    values,
    pages,
    index,
    stops,
    cos,
    sin,
    outs,
    lses,
    kv_heads,
    sharing,
    table_width,
    start,
    count,
    each,
    parts_before,
    slots,
    pairs,
    scale,
    softcap,
    QUERIES_PER_KV: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
    RAGGED: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    # The query heads of a key head are the rows of one product, so that a key is read once for all of them.
    part, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sequence = lane // kv_heads
    rows, channels, some = tl.arange(0, ROWS), tl.arange(0, DP), tl.arange(0, BLOCK)
    asked = (rows < QUERIES_PER_KV)[:, None] & (channels < D)[None, :]
    q = tl.load(query + (lane * QUERIES_PER_KV + rows)[:, None] * D + channels[None, :], mask=asked, other=0.0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DP], tl.float32)
    end = tl.minimum(count, (part + 1) * each)
    if RAGGED:
        end = tl.minimum(end, tl.load(stops + lane // sharing) - start)
    for at in range(part * each, end, BLOCK):
        place = at + some
        held = place < end
        if LISTED:
            tokens = tl.load(index + sequence * count + place, mask=held, other=0).to(tl.int32)
        else:
            tokens = start + place
        spots = rows_of(pages + lane * table_width, tokens, held)
        key = fetched(keys, spots, channels, held, D, DP)
        if ROTATED:
            partner, _, _ = partners(channels, pairs, INTERLEAVED)
            other = fetched(keys, spots, partner, held, D, DP)
            key = rotated(key, other, cos, sin, place, held, channels, pairs, INTERLEAVED).to(key.dtype)
        logits = product(q, tl.trans(key), tl.zeros([ROWS, BLOCK], tl.float32)) * scale
        if SOFTCAP:
            logits = capped(logits, softcap)
        logits = tl.where(held[None, :], logits, float("-inf"))
        # A part begins with a token, so the maximum is finite from the first block on.
        weights, shrink, most, total = softened(logits, most, total)
        value = fetched(values, spots, channels, held, D, DP)
        sums = product(weights.to(value.dtype), value, sums * shrink[:, None])
    row = (lane * QUERIES_PER_KV + rows) * slots + parts_before + part
    put_part(outs, lses, row, rows, channels, sums, most, total, QUERIES_PER_KV, D)


@at_home
def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lanes: Lanes,
    tokens: Tensor | range,
    *,
    angles: Angles | None,
    interleaved: bool,
    scale: float,
    softcap: float | None,
    ends: list[int] | None = None,
    stops: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As in the contract: out [sequences, heads, d] and lse [sequences, heads] in float32.

    ``query`` [sequences, heads, d], head = h_kv * g + i, is rounded to the dtype of the keys; lanes are (sequence, key
    head) in that order. ``tokens``: a range that all read, or int64 [sequences, m]; with ``angles`` [m, r] keys are
    rotated as they are read. ``stops`` int32 [sequences], on the device: sequence i reads its tokens before
    ``stops[i]`` only, so that one captured call serves lengths up to that of the range; int32 [lanes]: each lane does.
    """
    if ends is not None:
        checks.ends_of(ends, tokens, lanes)
        stops = torch.tensor(ends, dtype=torch.int32).to(query.device, non_blocking=True)
    return merge_parts(
        *decode_parts(
            query,
            keys,
            values,
            lanes,
            tokens,
            angles=angles,
            interleaved=interleaved,
            scale=scale,
            softcap=softcap,
            stops=stops,
        )
    )


def decode_parts(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lanes: Lanes,
    tokens: Tensor | range,
    *,
    angles: Angles | None = None,
    interleaved: bool = False,
    scale: float,
    softcap: float | None,
    stops: Tensor | None = None,
    parts_before: int = 0,
) -> tuple[Tensor, Tensor]:
    """As ``decode``, before the answers of parts are joined: out [sequences, heads, parts, d] and lse [sequences,
    heads, parts]. The first ``parts_before`` parts are left for another kernel to fill."""
    sequences, heads, dim = query.shape
    queries_per_kv, device = checks.queries_per_kv_of(sequences * heads, lanes, MAX_QUERIES_PER_KV), query.device
    checks.pair_of_pools(keys, values, dim)
    query = query.to(keys.dtype).contiguous()
    start, count = checks.tokens_of(tokens, sequences)
    checks.check(stops is None or isinstance(tokens, range), "lists have no stops")
    if angles is not None:
        checks.angles_fit(angles, count, dim)
        angles = angles[0].float().contiguous(), angles[1].float().contiguous()
    # A list is short: many small parts. Wide rows, and rotated ones twice, take registers.
    wide = dim > 128 or keys.dtype == torch.float32
    block = PAGE >> (int(wide) + int(angles is not None))
    unit = block if isinstance(tokens, Tensor) else 4 * PAGE
    each, parts = split(-(-count // unit), lanes.count, device)
    # Two stages pass before a page's place is known, so these hold two blocks on their way.
    stages = 3 if wide and angles is not None else 5
    if keys.dtype == torch.float32 and scarce(dim, device):
        stages = 1
    slots = parts_before + parts
    outs = torch.empty(sequences, heads, slots, dim, dtype=torch.float32, device=device)
    lses = torch.empty(sequences, heads, slots, dtype=torch.float32, device=device)
    pages = table(lanes, device)
    cos, sin = angles if angles is not None else (lses, lses)
    _decode[(parts, lanes.count)](
        query,
        keys,
        values,
        pages,
        tokens if isinstance(tokens, Tensor) else pages,
        pages if stops is None else stops,
        cos,
        sin,
        outs,
        lses,
        lanes.count // sequences,
        lanes.count // (lanes.count if stops is None else len(stops)),
        pages.shape[1],
        start,
        count,
        each * unit,
        parts_before,
        slots,
        cos.shape[-1] if angles is not None else 0,
        scale,
        softcap or 0.0,
        QUERIES_PER_KV=queries_per_kv,
        ROWS=padded(queries_per_kv),
        D=dim,
        DP=padded(dim),
        BLOCK=block,
        LISTED=isinstance(tokens, Tensor),
        RAGGED=stops is not None,
        ROTATED=angles is not None,
        INTERLEAVED=interleaved,
        SOFTCAP=softcap is not None,
        num_warps=4,
        num_stages=stages,
    )
    return outs, lses
