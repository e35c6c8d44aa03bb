"""Products of float32 queries with 16-bit keys, or with sketches of keys.

A query is cut in two 16-bit parts whose products add up in float32: the matrix units have time for that while the keys
come.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvote.kernels.triton.common import fetched, product
from kvote.kernels.triton.sketch import codes_of, scales_of


@triton.jit
def halves(places, channels, asked, WIDTH: tl.constexpr, like):
    """Float32 queries [rows, channels] as two parts of the dtype of ``like`` that add up to them."""
    q = tl.load(places + channels[None, :], mask=asked[:, None] & (channels < WIDTH)[None, :], other=0.0)
    upper = q.to(like)
    return upper, (q - upper.to(tl.float32)).to(like)


@triton.jit
def queries_of(query, rows, asked, keys, D: tl.constexpr, DP: tl.constexpr, BITS: tl.constexpr):
    """The query channels that are multiplied with keys or codes: both parts of all channels, or of each half of them
    for 4-bit codes."""
    places, channels = query + rows[:, None] * D, tl.arange(0, DP)
    if BITS == 0:
        upper, lower = halves(places, channels, asked, D, keys.dtype.element_ty)
        return upper, lower, upper, lower
    elif BITS == 8:
        upper, lower = halves(places, channels, asked, D, tl.bfloat16)
        return upper, lower, upper, lower
    else:
        upper, lower = halves(places, channels, asked, D // 2, tl.bfloat16)
        upper_2, lower_2 = halves(places + D // 2, channels, asked, D // 2, tl.bfloat16)
        return upper, lower, upper_2, lower_2


@triton.jit
def twice(upper, lower, key, acc):
    """acc + (upper + lower) key; float32 keys meet a query that is whole."""
    acc = product(upper, key, acc)
    if key.dtype != tl.float32:
        acc = product(lower, key, acc)
    return acc


@triton.jit
def put_scores(
    query, scores, lane, rows, key, token, held, start, stop, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):
    """Stores q.k of all ``rows`` of a lane with one block of its keys [DP, tokens], ``ROWS`` of them at a time."""
    for at in range(0, rows, ROWS):
        row = at + tl.arange(0, ROWS)
        line = lane * rows + row
        upper, lower = halves(query + line[:, None] * D, tl.arange(0, DP), row < rows, D, key.dtype)
        score = twice(upper, lower, key, tl.zeros([ROWS, key.shape[1]], tl.float32))
        spots = scores + line[:, None] * (stop - start) + (token - start)[None, :]
        tl.store(spots, score, mask=(row < rows)[:, None] & held[None, :])


@triton.jit
def scores_of(
    upper,
    lower,
    upper_2,
    lower_2,
    pool,
    codes,
    scales,
    slots,
    held,
    D: tl.constexpr,
    DP: tl.constexpr,
    BITS: tl.constexpr,
):
    """q.k [rows, tokens] in float32 with the keys, or their sketches, in pool rows ``slots``."""
    acc = tl.zeros([upper.shape[0], slots.shape[0]], tl.float32)
    if BITS == 0:
        return twice(upper, lower, tl.trans(fetched(pool, slots, tl.arange(0, DP), held, D, DP)), acc)
    else:
        code, code_2 = codes_of(codes, slots, held, D, DP, BITS)
        acc = twice(upper, lower, tl.trans(code), acc)
        if BITS == 4:
            acc = twice(upper_2, lower_2, tl.trans(code_2), acc)
        return acc * scales_of(scales, slots, held, D, BITS)[None, :]
