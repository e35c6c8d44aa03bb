"""Soft votes and their winners: every head spreads one vote over the candidates by a softmax, votes are summed.

Three launches. The first reads the keys (or their sketch) once for all query heads of a key head, split over the
tokens, and leaves float32 scores and every part's log-sum-exp; a short one joins those; the last weighs the scores of
all heads and adds them up. Scores are a fraction of the keys' bytes (with 7 query heads of 128 channels per key head, a
ninth), and reading keys twice would cost more.

**Precision.** Scoring queries are float32, keys have 16 bits (``products``).

``skip`` (bool [b], on the device) is how a selection cache decides without asking the host: a sequence whose flag is
set is not read, and what comes out for it means nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvote.kernels import checks
from kvote.kernels.lanes import Lanes
from kvote.kernels.triton.common import (
    PAGE,
    at_home,
    integers,
    padded,
    rows_of,
    scarce,
    split,
    table,
)
from kvote.kernels.triton.products import queries_of, scores_of
from kvote.kernels.triton.sketch import centres, sketch_views

# Rows of a product at most: query heads times selecting queries.
_ROWS = 64
_AT_ONCE = 1024


@triton.jit(do_not_specialize=("kv_heads", "table_width", "selections", "start", "stop", "each"))
def _score(
    query,
    keys,
    codes,
    scales,
    pages,
    limits,
    skip,
    logits,
    lses,
    kv_heads,
    table_width,
    selections,
    start,
    stop,
    each,
    QUERIES_PER_KV: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SKIPS: tl.constexpr,
):
    part, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # Rows are query heads of this key head, each with all selecting queries.
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    asked = row < QUERIES_PER_KV * selections
    limit = tl.load(limits + row % selections, mask=asked, other=0)
    begin = start // BLOCK * BLOCK + part * each
    end = tl.minimum(begin + each, stop)
    if SKIPS:
        end = tl.where(tl.load(skip + lane // kv_heads) != 0, begin, end)
    # Scores lie as [sequence, selection, head, token].
    sequence, head = lane // kv_heads, lane % kv_heads * QUERIES_PER_KV + row // selections
    line = (sequence * selections + row % selections) * (kv_heads * QUERIES_PER_KV) + head
    mine = lane * (QUERIES_PER_KV * selections) + row
    upper, lower, upper_2, lower_2 = queries_of(query, mine, asked, keys, D, DP, BITS)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for at in range(begin, end, BLOCK):
        token = at + tl.arange(0, BLOCK)
        held = (token >= start) & (token < end)
        slots = rows_of(pages + lane * table_width, token, held)
        score = scores_of(upper, lower, upper_2, lower_2, keys, codes, scales, slots, held, D, DP, BITS)
        tl.store(
            logits + line[:, None] * (stop - start) + (token - start)[None, :],
            score,
            mask=asked[:, None] & held[None, :],
        )
        score = tl.where(held[None, :] & (token[None, :] < limit[:, None]), score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(most - safe) + tl.sum(tl.exp(score - safe[:, None]), 1)
        most = higher
    saw = total > 0
    lse = tl.where(saw, most + tl.log(tl.where(saw, total, 1.0)), float("-inf"))
    tl.store(lses + line * tl.num_programs(0) + part, lse, mask=asked)


@triton.jit(do_not_specialize=("parts",))
def _join(lses, lse, parts, AT_ONCE: tl.constexpr):
    row, some = tl.program_id(0).to(tl.int64), tl.arange(0, AT_ONCE)
    most = tl.full([AT_ONCE], float("-inf"), tl.float32)
    for at in range(0, parts, AT_ONCE):
        most = tl.maximum(most, tl.load(lses + row * parts + at + some, mask=at + some < parts, other=float("-inf")))
    top = tl.max(most, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([AT_ONCE], tl.float32)
    for at in range(0, parts, AT_ONCE):
        total += tl.exp(tl.load(lses + row * parts + at + some, mask=at + some < parts, other=float("-inf")) - top)
    mass = tl.sum(total, 0)
    tl.store(lse + row, tl.where(mass > 0, top + tl.log(tl.where(mass > 0, mass, 1.0)), float("-inf")))


@triton.jit(do_not_specialize=("selections", "heads", "start", "count"))
def _weigh(
    logits,
    lse,
    limits,
    skip,
    votes,
    selections,
    heads,
    start,
    count,
    AT_ONCE: tl.constexpr,
    FORBID: tl.constexpr,
    SKIPS: tl.constexpr,
):
    line = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * AT_ONCE + tl.arange(0, AT_ONCE)
    held = token < count
    row, last = line * heads, heads
    if SKIPS:
        last = tl.where(tl.load(skip + line // selections) != 0, 0, heads)
    votes_of = tl.zeros([AT_ONCE], tl.float32)
    for head in range(0, last):
        score = tl.load(logits + (row + head) * count + token, mask=held, other=float("-inf"))
        votes_of += tl.exp(score - tl.load(lse + row + head))
    seen = start + token < tl.load(limits + line % selections)
    votes_of = tl.where(seen, votes_of, float("-inf") if FORBID else 0.0)
    tl.store(votes + line * count + token, votes_of, mask=held)


@triton.jit(do_not_specialize=("kv_heads", "table_width", "selections", "start", "count"))
def _score_list(
    query,
    keys,
    pages,
    index,
    scores,
    kv_heads,
    table_width,
    selections,
    start,
    count,
    QUERIES_PER_KV: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Exact scores of the tokens of a list per selecting query."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    line, head = tl.program_id(1).to(tl.int64), tl.program_id(2)
    sequence, selection = line // selections, line % selections
    lane = sequence * kv_heads + head
    held = place < count
    token = tl.load(index + line * count + place, mask=held, other=0).to(tl.int32) + start
    slots = rows_of(pages + lane * table_width, token, held)
    group = tl.arange(0, ROWS)
    mine = (lane * QUERIES_PER_KV + group) * selections + selection
    upper, lower, _, _ = queries_of(query, mine, group < QUERIES_PER_KV, keys, D, DP, 0)
    score = scores_of(upper, lower, upper, lower, keys, keys, keys, slots, held, D, DP, 0)
    out = (line * kv_heads + head) * QUERIES_PER_KV + group
    tl.store(
        scores + out[:, None] * count + place[None, :], score, mask=(group < QUERIES_PER_KV)[:, None] & held[None, :]
    )


class _Ballot:
    """Scores of one call, and every head's log-sum-exp over what it may see."""

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        lanes: Lanes,
        sketch: Tensor | None,
        bits: int,
        start: int,
        limits: list[int],
        skip: Tensor | None,
    ) -> None:
        batch, heads, selections, dim = query.shape
        device, stop = query.device, checks.limits_of(limits, selections, start)
        checks.pool_of_keys(keys, dim)
        checks.check(lanes.count % batch == 0, "there must be as many lanes of each sequence")
        checks.queries_per_kv_of(batch * heads, lanes, heads)
        self.query, self.keys, self.lanes, self.start = query.float().contiguous(), keys, lanes, start
        self.shape, self.count, self.skip = (batch, selections, heads), stop - start, skip
        self.kv_heads = lanes.count // batch
        self.queries_per_kv = heads // self.kv_heads
        self.pages, self.limits = table(lanes, device), integers(limits, device)
        rows = min(_ROWS, padded(self.queries_per_kv * selections))
        blocks = -(-self.queries_per_kv * selections // rows)
        units = -(-(stop - start // PAGE * PAGE) // PAGE)
        # Two stages pass before a page's place is known; a page of codes is small, so more of them are on their way.
        stages = 8 if sketch is not None else 5 if dim <= 128 and keys.dtype != torch.float32 else 3
        if sketch is None and keys.dtype == torch.float32 and scarce(dim, device):
            stages = 1
        each, parts = split(units, lanes.count * blocks, device, least=4)
        self.logits = torch.empty(*self.shape, self.count, dtype=torch.float32, device=device)
        lses = torch.empty(*self.shape, parts, dtype=torch.float32, device=device)
        codes, scales = sketch_views(sketch, bits) if sketch is not None else (keys, keys)
        _score[(parts, lanes.count, blocks)](
            self.query,
            keys,
            codes,
            scales,
            self.pages,
            self.limits,
            self.limits if skip is None else skip,
            self.logits,
            lses,
            self.kv_heads,
            self.pages.shape[1],
            selections,
            start,
            stop,
            each * PAGE,
            QUERIES_PER_KV=self.queries_per_kv,
            ROWS=rows,
            D=dim,
            DP=padded(dim if bits != 4 or sketch is None else dim // 2),
            BITS=bits if sketch is not None else 0,
            BLOCK=PAGE,
            SKIPS=skip is not None,
            num_warps=4,
            num_stages=stages,
        )
        self.lse = torch.empty(self.shape, dtype=torch.float32, device=device)
        _join[(lses[..., 0].numel(),)](lses, self.lse, parts, AT_ONCE=128, num_warps=4)

    def votes(self, *, forbid: bool) -> Tensor:
        """Votes [b, r, n]; of tokens that a query may not see, 0, or -inf with ``forbid``."""
        batch, selections, heads = self.shape
        out = torch.empty(batch, selections, self.count, dtype=torch.float32, device=self.query.device)
        _weigh[(-(-self.count // _AT_ONCE), batch * selections)](
            self.logits,
            self.lse,
            self.limits,
            self.limits if self.skip is None else self.skip,
            out,
            selections,
            heads,
            self.start,
            self.count,
            AT_ONCE=_AT_ONCE,
            FORBID=forbid,
            SKIPS=self.skip is not None,
            num_warps=4,
        )
        return out

    def rescored(self, nominated: Tensor) -> Tensor:
        """Votes [b, r, m] of the ``nominated`` [b, r, m], scored again with their keys (``reference.rescored``)."""
        batch, selections, heads = self.shape
        m, dim = nominated.shape[-1], self.query.shape[-1]
        exact = torch.empty(batch, selections, heads, m, dtype=torch.float32, device=self.query.device)
        block = PAGE if dim <= 128 else PAGE // 2
        _score_list[(-(-m // block), batch * selections, self.kv_heads)](
            self.query,
            self.keys,
            self.pages,
            nominated,
            exact,
            self.kv_heads,
            self.pages.shape[1],
            selections,
            self.start,
            m,
            QUERIES_PER_KV=self.queries_per_kv,
            ROWS=padded(self.queries_per_kv),
            D=dim,
            DP=padded(dim),
            BLOCK=block,
            num_warps=4,
        )
        places = nominated[:, :, None].expand(exact.shape)
        # Scores from the sketch lack the product of the query with the centre of its lane.
        centre = centres(self.keys, self.pages, [self.start + self.count] * self.lanes.count)
        lanes = (
            centre.view(batch, self.kv_heads, 1, dim)
            .expand(-1, -1, self.queries_per_kv, -1)
            .reshape(batch, heads, 1, dim)
        )
        shift = (self.query * lanes).sum(-1).transpose(1, 2)
        rough, lse = self.logits.gather(-1, places) + shift[..., None], self.lse + shift
        # What all tokens hold, less what the nominated were thought to hold, plus what they do; a difference of what
        # was rounded must not fall below nothing.
        top = torch.maximum(lse, exact.amax(-1))[..., None]
        rest = (torch.exp(lse[..., None] - top) - torch.exp(rough - top).sum(-1, keepdim=True)).clamp(min=0)
        mass = rest + torch.exp(exact - top).sum(-1, keepdim=True)
        return (torch.exp(exact - top) / mass).sum(dim=2)


@at_home
def scores(query: Tensor, keys: Tensor, lanes: Lanes, start: int, stop: int) -> Tensor:
    """q.k [b, r, heads, n] in float32 of ``query`` [b, heads, r, d] with tokens ``start`` to ``stop``."""
    checks.scoring(query, keys, keys.shape[2], lanes, start, stop)
    if stop == start:
        return query.new_empty(*query.shape[:3], 0, dtype=torch.float32).transpose(1, 2)
    return _Ballot(query, keys, lanes, None, 0, start, [stop] * query.shape[2], None).logits


@at_home
def votes(
    query: Tensor, keys: Tensor, lanes: Lanes, sketch: Tensor | None, bits: int, start: int, limits: list[int]
) -> Tensor:
    """Soft votes [r, n] of one sequence for tokens ``start`` to ``max(limits)``, or [b, r, n] of a batch.

    As in the contract, with ``query`` [heads, r, d] float32, or [b, heads, r, d] with the lanes of all sequences. A
    sketch is met with the query as it is, not with 8 bits of it.
    """
    alone = query.dim() == 3
    out = _Ballot(query[None] if alone else query, keys, lanes, sketch, bits, start, limits, None).votes(forbid=False)
    return out[0] if alone else out


@at_home
def select(
    query: Tensor,
    keys: Tensor,
    lanes: Lanes,
    sketch: Tensor | None,
    bits: int,
    start: int,
    limits: list[int],
    k: int,
    nominate: int = 0,
    skip: Tensor | None = None,
) -> Tensor:
    """The ``k`` tokens [r, k] (or [b, r, k]) with the most ``votes``, ascending; arguments as there.

    As in the contract; which of equally many votes win is torch's choice (``top_k``). ``skip``: see the head of
    this file.
    """
    alone = query.dim() == 3
    fewest = checks.winners_of(k, start, limits)
    ballot = _Ballot(query[None] if alone else query, keys, lanes, sketch, bits, start, limits, skip)
    counted = ballot.votes(forbid=True)
    if nominate and sketch is not None:
        nominated = top_k(counted, min(max(nominate, k), fewest))
        won = nominated.gather(-1, top_k(ballot.rescored(nominated), k))
    else:
        won = top_k(counted, k)
    won = won + start
    return won[0] if alone else won


@at_home
def top_k(votes: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest of ``votes`` [..., n] float32, ascending.

    torch's own selection by digits on the device, which waits for nobody. Which of equal votes at the edge win is
    left to it; on NVIDIA GPUs torch 2.13 takes the lower indices, but does not promise to.
    """
    checks.winners_of(k, 0, [votes.shape[-1]])
    return votes.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
