"""Per-query token selection by head votes: sinks, the tokens that win the vote, and the local context.

The lists read by a block of queries that are slots a .. b-1 of their sequence:
    sinks [0, sinks)  +  top_k winners of [sinks, edge)  +  local context [edge, b),
where edge = a - window, or b - window where the window reaches back from the end of the block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from kvote import kernels
from kvote.errors import MethodError
from kvote.index.sketch import NAME as SKETCH
from kvote.index.sketch import SketchIndex
from kvote.kernels.contract import Choice
from kvote.needs import WHOLE, Cuts, Keys, Needs, ReaderOffers
from kvote.numbers import check_flags, check_whole, is_number
from kvote.read.reader import Activity, Reading, Token
from kvote.read.reuse import SelectionMemory, SumOverRanks, resembles
from kvote.read.votes import vote_named
from kvote.rope import Rope
from kvote.tokens import Positions, Span, TokenSet

# Float32 entries of scores held at a time when many single tokens select (64 MiB).
_SCORES_HELD = 1 << 24
# A 4-bit sketch nominates this many tokens at least, and four times as many as are read: with fewer, up to a point of
# attention mass is lost that the keys themselves would have found (bench/recall.py).
_NOMINATED = 4096
# What a selection scores with, and the bits per channel of that copy of the keys.
SKETCHES = {"none": 0, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class HeadVotes:
    """Parameters as in ``methods/tokenselect.py``, which documents them. ``window_from``: the end of a block of queries
    ('start' or 'end') from which its window reaches back. ``reuse_span``: None is for no limit."""

    top_k: int
    sinks: int
    window: int
    chunk: int
    tail: int
    theta: float
    reuse_span: int | None
    max_pool: int
    head_map: str
    selection: str
    sketch: str
    positions: Positions
    tensor_parallel: bool
    window_from: Literal["start", "end"] = "start"

    def __post_init__(self) -> None:
        check_whole(self, top_k=1, sinks=0, window=0, chunk=1, tail=0, max_pool=0)
        if self.reuse_span is not None:
            check_whole(self, reuse_span=1)
        if self.window_from == "end" and self.window < self.chunk:
            raise MethodError(
                f"A window that reaches back from the end of a chunk must hold the chunk, or queries would not see "
                f"their own tokens; give window of at least {self.chunk}, or a smaller chunk; got window={self.window}."
            )
        if not is_number(self.theta):
            raise MethodError(f"theta must be a finite number; got {self.theta!r}.")
        check_flags(self, "tensor_parallel")
        if self.head_map not in ("gqa", "paper"):
            raise MethodError(f"head_map must be 'gqa' or 'paper'; got {self.head_map!r}.")
        if self.positions not in ("contiguous", "original"):
            raise MethodError(f"positions must be 'contiguous' or 'original'; got {self.positions!r}.")
        if self.sketch not in SKETCHES:
            raise MethodError(f"sketch must be 'none', 'int8' or 'int4'; got {self.sketch!r}.")
        vote_named(self.selection)
        if self.sketch != "none" and self.selection != "soft_vote":
            raise MethodError(f"sketch={self.sketch!r} serves selection='soft_vote' only, not {self.selection!r}.")
        if self.nominated and not self._fused:
            raise MethodError(
                f"sketch={self.sketch!r} scores its nominees again and takes neither max_pool nor tensor_parallel; "
                "use sketch='int8'."
            )

    @cached_property
    def needs(self) -> Needs:
        bits = SKETCHES[self.sketch]
        indexes = (SketchIndex(bits),) if bits else ()
        paired = self.head_map == "paper"
        return Needs(Keys.UNROTATED, lists=True, indexes=indexes, equal_heads=True, whole_layers=paired)

    @property
    def offers(self) -> ReaderOffers:
        # Sketches of keys are made of several tokens at once.
        return ReaderOffers(cuts=WHOLE if self.needs.indexes else Cuts(self.chunk))

    @property
    def nominated(self) -> int:
        """How many tokens votes from the sketch only nominate; 0 where they decide."""
        return max(_NOMINATED, 4 * self.top_k) if self.sketch == "int4" else 0

    @property
    def _fused(self) -> bool:
        """Whether nothing happens between the votes and their winners, so that the segment may do both at once."""
        return self.selection == "soft_vote" and self.max_pool <= 1 and not self.tensor_parallel

    @property
    def reuses(self) -> bool:
        """A cosine never exceeds 1, so a larger threshold turns the selection cache off."""
        return self.theta <= 1

    def check(self, layers: int) -> None:
        pass

    def new_memory(self) -> SelectionMemory | None:
        return SelectionMemory() if self.reuses else None

    def read(self, reading: Reading) -> Iterator[Span]:
        tail_from = max(0, reading.count - reading.tail_queries)
        row = 0
        while row < reading.count:
            slot = reading.first + row
            alone = row >= tail_from
            # Chunks are cut at multiples of their size: passes that end at such multiples cut a prompt the same way.
            stop = reading.count if alone else min(tail_from, row + self.chunk - slot % self.chunk)
            if self._edge(reading, row, row + 1 if alone else stop) - self.sinks <= self.top_k:
                last = self.sinks + self.top_k + self.window - reading.first - (self.window_from == "end")
                stop = min(stop, max(row, last) + 1) if alone else stop
                yield self._dense(reading, row, stop)
            elif alone:
                stop = min(stop, row + self._rows_at_once(reading, slot))
                yield self._one_by_one(reading, row, stop)
            else:
                yield self._together(reading, row, stop)
            row = stop

    def _edge(self, reading: Reading, row: int, stop: int) -> int:
        """First slot of the local context of query rows ``row`` to ``stop``."""
        at = reading.first + (row if self.window_from == "start" else stop)
        return self._edge_from(at, generated=reading.decode)

    def _edge_from(self, at: int, *, generated: bool) -> int:
        """First slot of a local context that reaches back from slot ``at``. Where a list may be reused for a limited
        span it moves in steps of that, so that the tokens that leave the window meanwhile are still read."""
        edge = at - self.window
        if not self.reuses or self.reuse_span is None or not generated or edge <= 0:
            return edge
        return edge // self.reuse_span * self.reuse_span

    def step(self, token: Token, segment: Any, rope: Rope | None, memory: Any, activity: Activity) -> Tensor | None:
        """Does what ``Everything.step`` does."""
        if rope is None or not rope.fixed or not self._fused or self.head_map == "paper":
            return None
        if self.positions != "contiguous":
            return None
        first = segment.length(0)
        edge = self._edge_from(first + (self.window_from == "end"), generated=True)
        back = rope.back_at(token.position, token.key.dtype, token.key.device)
        if edge - self.sinks <= self.top_k:
            answer: tuple[Tensor, bool] | None = segment.step(token, back, None)
            if answer is not None:
                activity.tokens_read = first + 1
            return None if answer is None else answer[0]
        past = kept = None
        if memory is not None and memory.serves(1) and self._may_serve(memory, edge):
            past, kept = memory.query, memory.index
        asked = torch.empty(1, token.query.shape[1] * token.query.shape[3])
        winners = torch.empty(1, self.top_k, dtype=torch.int64)
        nominated = self.nominated if SKETCH in segment.indexes else 0
        choice = Choice(self.top_k, self.sinks, edge, nominated, self.window, asked, winners, self.theta, past, kept)
        answer = segment.step(token, back, choice)
        if answer is None:
            return None
        if answer[1]:
            activity.reused += 1
        else:
            activity.selections += 1
            if memory is not None:
                memory.remember(asked, winners, edge)
        activity.tokens_read = self.sinks + self.top_k + first + 1 - edge
        return answer[0]

    def _may_serve(self, memory: SelectionMemory, edge: int) -> bool:
        """Does what ``_within_span`` does, for the only sequence."""
        selected = memory.edge_of_first
        return selected == edge if self.reuse_span is not None else selected >= 0

    def _rows_at_once(self, reading: Reading, slot: int) -> int:
        heads = reading.queries.rotated.shape[1] * len(reading.rows)
        return max(1, _SCORES_HELD // (heads * slot))

    def _dense(self, reading: Reading, row: int, stop: int) -> Span:
        reading.activity.tokens_read = reading.first + stop
        return Span(row, stop, [TokenSet(range(reading.first + stop), positions=self.positions)])

    def _together(self, reading: Reading, row: int, stop: int) -> Span:
        """A chunk of queries selects with its average and shares the tokens."""
        query = self._scoring_queries(reading, row, stop).mean(dim=2, keepdim=True)
        edge = self._edge(reading, row, stop)
        return self._span(reading, row, stop, self._select(reading, query, [edge]), [edge])

    def _one_by_one(self, reading: Reading, row: int, stop: int) -> Span:
        """Each query selects for itself, or, in a decode step, may reuse what its sequence selected before."""
        edges = [self._edge(reading, i, i + 1) for i in range(row, stop)]
        query = self._scoring_queries(reading, row, stop)
        memory = reading.memory
        if reading.decode and isinstance(memory, SelectionMemory):
            index = self._select_or_reuse(reading, query, edges[0], memory)
        else:
            index = self._select(reading, query, edges)
        return self._span(reading, row, stop, index, edges)

    def _scoring_queries(self, reading: Reading, row: int, stop: int) -> Tensor:
        """Queries [b, heads, rows, d] as if each chunk began right behind its window and all candidates were at 0."""
        rope, unrotated = reading.rope, reading.queries.unrotated
        assert rope is not None
        assert unrotated is not None
        rows = (unrotated if stop - row == reading.count else unrotated[:, :, row:stop]).float()
        alone, count = row >= reading.count - reading.tail_queries, stop - row
        cos, sin = rope.contiguous(self.window + self.chunk, unrotated.device, start=self.window)
        at = slice(0, 1 if alone else count)
        return rope.apply(rows, (cos[at].expand(count, -1), sin[at].expand(count, -1)))

    def _select(self, reading: Reading, query: Tensor, edges: list[int], skip: Tensor | None = None) -> Tensor:
        """Winners [b, r, top_k] for selecting queries [b, heads, r, d], query j among the tokens before edges[j].

        ``skip`` bool [b]: sequences whose winners are not used.
        """
        reading.activity.selections += query.shape[0] * query.shape[2]
        if self._fused:
            query = self._paired(query, reading)
            sketch = reading.segment.indexes.get(SKETCH)
            voted = reading.segment if sketch is None else sketch
            more: dict[str, Any] = {"skip": skip} if skip is not None and voted.skips else {}
            if sketch is not None:
                more["nominate"] = self.nominated
            return voted.winners(query, reading.rows, self.sinks, edges, self.top_k, **more)
        votes = SumOverRanks(self.tensor_parallel)(self._votes(reading, query, edges))
        if self.max_pool > 1 or len(edges) > 1:
            pooled = kernels.max_pool(kernels.forbid(votes, self.sinks, edges), self.max_pool)
            votes = kernels.forbid(pooled, self.sinks, edges)
        return kernels.top_k(votes, self.top_k) + self.sinks

    def _paired(self, query: Tensor, reading: Reading) -> Tensor:
        return _paper_heads(query, reading.segment.heads) if self.head_map == "paper" else query

    def _votes(self, reading: Reading, query: Tensor, edges: list[int]) -> Tensor:
        """Votes [b, r, n] for the tokens from ``sinks`` up to the last edge."""
        query = self._paired(query, reading)
        if self.selection == "soft_vote":
            voted = reading.segment.indexes.get(SKETCH, reading.segment)
            return voted.votes(query, reading.rows, self.sinks, edges)
        logits = reading.segment.scores(query, reading.rows, self.sinks, edges[-1])
        return vote_named(self.selection)(kernels.forbid(logits, self.sinks, edges), self.top_k)

    def _select_or_reuse(self, reading: Reading, query: Tensor, edge: int, memory: SelectionMemory) -> Tensor:
        """Winners [b, 1, top_k] of a decode step: what a sequence selected before, or what its query selects now."""
        flat = query.reshape(len(reading.rows), -1)
        memory.prepare(reading.sequences, flat, self.top_k)
        past, _, began = memory.of(reading.rows)
        same = resembles(flat, past, self.theta, SumOverRanks(self.tensor_parallel)) & self._within_span(began, edge)
        # A GPU decides by itself: asking it would mean to wait for it in every layer.
        renew = self._renew_unasked if kernels.chosen(query).ASKING_WAITS else self._renew
        return renew(reading, query, edge, memory, same)[:, None]

    def _renew(self, reading: Reading, query: Tensor, edge: int, memory: SelectionMemory, same: Tensor) -> Tensor:
        """Winners [b, top_k], which only sequences that are not the ``same`` [b] select anew."""
        fresh = (~same).nonzero()[:, 0]
        reading.activity.reused += len(reading.rows) - len(fresh)
        if len(fresh):
            chosen = [reading.rows[i] for i in fresh.tolist()]
            selected = self._select(reading.of(chosen), query[fresh], [edge])[:, 0]
            memory.put(chosen, query[fresh].flatten(1), selected, edge)
        return memory.of(reading.rows)[1]

    def _renew_unasked(
        self, reading: Reading, query: Tensor, edge: int, memory: SelectionMemory, same: Tensor
    ) -> Tensor:
        """The same with the decision left on the device: flags skip the reading of keys, and choose what is kept."""
        past, kept, _ = memory.of(reading.rows)
        fresh = self._select(reading, query, [edge], skip=same)[:, 0]
        index = torch.where(same[:, None], kept, fresh)
        memory.put(reading.rows, torch.where(same[:, None], past, query.flatten(1)), index, edge, in_place=True)
        hits = same.sum()
        reading.activity.reused = reading.activity.reused + hits
        reading.activity.selections = reading.activity.selections - hits
        return index

    def _within_span(self, selected: Tensor, edge: int) -> Tensor:
        """Whether what was chosen when the window began at ``selected`` [b] (-1: nothing was) may still serve."""
        return selected == edge if self.reuse_span is not None else selected >= 0

    def _span(self, reading: Reading, row: int, stop: int, winners: Tensor, edges: list[int]) -> Span:
        """Sinks, winners and local context as one ascending list per block of queries."""
        b, blocks, _ = winners.shape
        device = winners.device
        size = (stop - row) // blocks
        length = reading.first + row + size - edges[0]
        # Edges follow one another, as the queries do; made on the device, nothing is copied there.
        local = torch.arange(edges[0], edges[0] + length, device=device)
        local = local if blocks == 1 else local + torch.arange(blocks, device=device)[:, None]
        sinks = torch.arange(self.sinks, device=device)
        parts = (sinks.expand(b, blocks, -1), winners, local.expand(b, blocks, -1))
        index = torch.cat(parts, dim=-1)
        reading.activity.tokens_read = index.shape[-1]
        return Span(row, stop, [TokenSet(index, positions=self.positions)])


def _paper_heads(query: Tensor, kv_heads: int) -> Tensor:
    """Orders query heads [b, heads, r, d] as the published kernel pairs them: head h with key head h mod kv_heads."""
    b, heads, r, d = query.shape
    return query.reshape(b, heads // kv_heads, kv_heads, r, d).transpose(1, 2).reshape(b, heads, r, d)
