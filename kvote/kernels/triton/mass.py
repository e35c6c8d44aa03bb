"""Attention that tokens received from a few query rows, read from the pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvote.kernels import checks
from kvote.kernels.lanes import Lanes
from kvote.kernels.triton.common import PAGE, at_home, capped, fetched, integers, padded, product, rows_of, table

_ROWS = 64


@triton.jit(do_not_specialize=("rows", "t", "table_width", "start", "count"))
def _mass(
    query,
    lse,
    keys,
    pages,
    limits,
    mass,
    rows,
    t,
    table_width,
    start,
    count,
    scale,
    softcap,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    place, lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    held, channels = place < count, tl.arange(0, DP)
    slots = rows_of(pages + lane * table_width, start + place, held)
    key = tl.trans(fetched(keys, slots, channels, held, D, DP))
    received = tl.zeros([BLOCK], tl.float32)
    for at in range(0, rows, ROWS):
        row = at + tl.arange(0, ROWS)
        asked = row < rows
        spots = (lane * rows + row)[:, None] * D + channels[None, :]
        q = tl.load(query + spots, mask=asked[:, None] & (channels < D)[None, :], other=0.0)
        logits = product(q, key, tl.zeros([ROWS, BLOCK], tl.float32)) * scale
        if SOFTCAP:
            logits = capped(logits, softcap)
        total = tl.load(lse + lane * rows + row, mask=asked, other=float("-inf"))
        limit = tl.load(limits + row % t, mask=asked, other=0)
        # A row that saw nothing (-inf) gives nothing.
        gives = asked[:, None] & (total > float("-inf"))[:, None] & (start + place[None, :] < limit[:, None])
        received += tl.sum(tl.where(gives, tl.exp(logits - total[:, None]), 0.0), 0)
    tl.store(mass + lane * count + place, received, mask=held)


@at_home
def attention_mass(
    query: Tensor,
    lse: Tensor,
    keys: Tensor,
    lanes: Lanes,
    start: int,
    limits: list[int],
    *,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """As in the contract: [sequences, h, n] of tokens ``start`` to ``max(limits)``; ``query`` [sequences, heads,
    t, d], rounded to the dtype of the keys, with its ``lse`` [sequences, heads, t]."""
    sequences, heads, t, dim = query.shape
    h, count = lanes.count // sequences, checks.limits_of(limits, t, start) - start
    checks.pool_of_keys(keys, dim)
    rows, device = heads // h * t, query.device
    query, lse = query.to(keys.dtype).contiguous(), lse.float().contiguous()
    out = torch.empty(sequences, h, count, dtype=torch.float32, device=device)
    pages = table(lanes, device)
    block = PAGE if dim <= 128 and keys.dtype != torch.float32 else PAGE // 2
    _mass[(-(-count // block), lanes.count)](
        query,
        lse,
        keys,
        pages,
        integers(limits, device),
        out,
        rows,
        t,
        pages.shape[1],
        start,
        count,
        scale,
        softcap or 0.0,
        D=dim,
        DP=padded(dim),
        ROWS=min(_ROWS, padded(rows)),
        BLOCK=block,
        SOFTCAP=softcap is not None,
        num_warps=4,
    )
    return out
