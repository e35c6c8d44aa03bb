"""Scores of labels: a few channels of the keys, kept apart with those of a page in rows, channels before tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvote.kernels import checks
from kvote.kernels.lanes import Lanes
from kvote.kernels.triton.common import PAGE, at_home, padded, table
from kvote.kernels.triton.products import put_scores

_PAGE = tl.constexpr(PAGE)
# Rows of a product at most.
_ROWS = 64


@triton.jit(do_not_specialize=("table_width", "rows", "start", "stop"))
def _label_scores(
    query,
    labels,
    pages,
    scores,
    table_width,
    rows,
    start,
    stop,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
):
    lane, page = tl.program_id(1).to(tl.int64), start // _PAGE + tl.program_id(0)
    channels, place = tl.arange(0, RP), tl.arange(0, _PAGE)
    token = page * _PAGE + place
    held = (token >= start) & (token < stop)
    first = tl.load(pages + lane * table_width + page).to(tl.int64) * (R * _PAGE)
    mask = (channels < R)[:, None] & held[None, :]
    label = tl.load(labels + first + channels[:, None] * _PAGE + place[None, :], mask=mask, other=0.0)
    put_scores(query, scores, lane, rows, label, token, held, start, stop, ROWS, R, RP)


@at_home
def label_scores(query: Tensor, labels: Tensor, lanes: Lanes, start: int, stop: int) -> Tensor:
    """As in the contract: q.k [sequences, t, heads, stop - start] in float32 of ``query`` [sequences, heads, t, r]
    with labels [pages, r, PAGE] of any number of channels. Float32 queries meet 16-bit labels in two parts, as in
    ``votes``. Raises ValueError for what would be read wrongly."""
    sequences, heads, t, r = query.shape
    rows = checks.scoring(query, labels, labels.shape[1], lanes, start, stop)
    pages = table(lanes, query.device)
    out = torch.empty(sequences, heads, t, stop - start, dtype=torch.float32, device=query.device)
    if stop == start:
        return out.transpose(1, 2)
    _label_scores[(-(-stop // PAGE) - start // PAGE, lanes.count)](
        query.float().contiguous(),
        labels,
        pages,
        out,
        pages.shape[1],
        rows,
        start,
        stop,
        ROWS=min(_ROWS, padded(rows)),
        R=r,
        RP=padded(r),
        num_warps=4,
    )
    return out.transpose(1, 2)
