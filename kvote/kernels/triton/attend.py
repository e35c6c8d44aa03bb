"""Attention of blocks of queries (chunks of a prompt) over tokens that lie as plain tensors, with its log-sum-exp.

A chunk that selected its tokens reads them through ``tokens.gather``: fetched and rotated once, they are a few MiB that
stay in the second-level cache, where every block of query rows finds them. Rotating on the way into each block would
rotate a key once per 64 or 128 rows.

Online softmax over blocks of keys, as in FlashAttention-2 (Dao 2023, arXiv 2307.08691): blocks that all rows see whole
take no mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvote.kernels.checks import check
from kvote.kernels.triton.common import at_home, capped, padded, product, scarce

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _read(
    q,
    most,
    total,
    sums,
    keys,
    values,
    key_token,
    value_token,
    begin,
    end,
    row,
    shift,
    tokens,
    window,
    scale,
    softcap,
    D: tl.constexpr,
    DP: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Adds key blocks ``begin`` to ``end`` to the running softmax, which counts in powers of two."""
    channels = tl.arange(0, DP)
    for at in range(begin, end, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        far = column.to(tl.int64)
        if MASKED:
            inside = (column < tokens)[None, :] & (channels < D)[:, None]
            key = tl.load(keys + far[None, :] * key_token + channels[:, None], mask=inside, other=0.0)
        elif D == DP:
            key = tl.load(keys + far[None, :] * key_token + channels[:, None])
        else:
            key = tl.load(keys + far[None, :] * key_token + channels[:, None], mask=(channels < D)[:, None], other=0.0)
        logits = product(q, key, tl.zeros([q.shape[0], COLUMNS], tl.float32)) * scale
        if SOFTCAP:
            logits = capped(logits, softcap)
        logits = logits * _LOG2E
        if MASKED:
            seen = column[None, :] < tokens
            if CAUSAL:
                seen = seen & (column[None, :] <= row[:, None] + shift)
            if WINDOWED:
                seen = seen & (column[None, :] > row[:, None] + shift - window)
            logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(most, tl.max(logits, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        weights = tl.exp2(logits - safe[:, None])
        shrink = tl.exp2(most - safe)
        total = total * shrink + tl.sum(weights, 1)
        if MASKED:
            inside = (column < tokens)[:, None] & (channels < D)[None, :]
            value = tl.load(values + far[:, None] * value_token + channels[None, :], mask=inside, other=0.0)
        elif D == DP:
            value = tl.load(values + far[:, None] * value_token + channels[None, :])
        else:
            value = tl.load(
                values + far[:, None] * value_token + channels[None, :], mask=(channels < D)[None, :], other=0.0
            )
        sums = product(weights.to(value.dtype), value, sums * shrink[:, None])
        most = higher
    return most, total, sums


@triton.jit(do_not_specialize=("heads", "queries_per_kv", "t", "m", "window"))
def _attend(
    query,
    keys,
    values,
    out,
    lse,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    heads,
    queries_per_kv,
    t,
    m,
    window,
    scale,
    softcap,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    # The last rows see most: they begin first, so that the short ones fill the gaps at the end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    batch, head = line // heads, line % heads
    row, channels = block * ROWS + tl.arange(0, ROWS), tl.arange(0, DP)
    asked = (row < t)[:, None] & (channels < D)[None, :]
    rows = query + batch * query_batch + head * query_head + row.to(tl.int64)[:, None] * query_row
    q = tl.load(rows + channels[None, :], mask=asked, other=0.0)
    keys += batch * key_batch + head // queries_per_kv * key_head
    values += batch * value_batch + head // queries_per_kv * value_head
    # Row i sees columns up to i + m - t, and with a window only the last of those.
    shift = m - t
    end, plain = m, m // COLUMNS * COLUMNS
    begin = 0
    if CAUSAL:
        end = tl.minimum(m, tl.maximum(0, (block + 1) * ROWS + shift))
        plain = tl.minimum(plain, tl.maximum(0, block * ROWS + shift + 1)) // COLUMNS * COLUMNS
    if WINDOWED:
        begin = tl.maximum(0, block * ROWS + shift + 1 - window) // COLUMNS * COLUMNS
        plain = begin
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DP], tl.float32)
    most, total, sums = _read(
        q, most, total, sums, keys, values, key_token, value_token, begin, plain, row, shift, m, window, scale, softcap,
        D, DP, COLUMNS, False, CAUSAL, WINDOWED, SOFTCAP,
    )  # fmt: skip
    most, total, sums = _read(
        q, most, total, sums, keys, values, key_token, value_token, plain, end, row, shift, m, window, scale, softcap,
        D, DP, COLUMNS, True, CAUSAL, WINDOWED, SOFTCAP,
    )  # fmt: skip
    saw = total > 0
    sums = sums / tl.where(saw, total, 1.0)[:, None]
    place = line * t + row
    tl.store(out + place[:, None] * D + channels[None, :], sums.to(out.dtype.element_ty), mask=asked)
    tl.store(
        lse + place, tl.where(saw, (most + tl.log2(tl.where(saw, total, 1.0))) * _LN2, float("-inf")), mask=row < t
    )


def why_not(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> str | None:
    """The reason this kernel cannot answer, or None."""
    if key.shape[-1] != value.shape[-1]:
        return "keys and values differ in head size"
    if key.dtype != value.dtype or query.dtype != key.dtype:
        return "queries, keys and values differ in dtype"
    return None


@at_home
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As ``kernels.attend``: ``query`` [b, heads, t, d], ``key`` and ``value`` [b, h, m, d], rows at the end of the
    list if ``causal``. Out [b, heads, t, d] in the query's dtype, lse [b, heads, t] in float32."""
    reason = why_not(query, key, value, softcap)
    check(reason is None, str(reason))
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    b, heads, t, dim = query.shape
    h, m = key.shape[1], key.shape[2]
    out = torch.empty(b, heads, t, dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(b, heads, t, dtype=torch.float32, device=query.device)
    wide = query.dtype == torch.float32
    rows = padded(min(t, (32 if wide else 128) if dim <= 128 else (16 if wide else 64)))
    columns = (32 if wide else 64) if dim <= 128 else (16 if wide else 32)
    windowed = causal and window is not None
    _attend[(-(-t // rows), b * heads)](
        query,
        key,
        value,
        out,
        lse,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        heads,
        heads // h,
        t,
        m,
        window or 0,
        scale,
        softcap or 0.0,
        D=dim,
        DP=padded(dim),
        ROWS=rows,
        COLUMNS=columns,
        CAUSAL=causal,
        WINDOWED=windowed,
        SOFTCAP=softcap is not None,
        num_warps=8 if rows == 128 else 4,
        num_stages=2 if wide or scarce(dim, query.device) else 3,
    )
    return out, lse
