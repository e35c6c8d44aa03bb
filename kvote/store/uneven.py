"""Uncompressed pages whose lanes differ in length: key heads of a sequence, or sequences that are read in one call.

Places are aligned at the lanes' ends: the last token of every lane has the place of the longest one's last token, and a
lane that is shorter by k begins at place k. New tokens, whole prompts before them and what a rollback takes back are
then the same places in every lane.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kvote.kernels import reference
from kvote.rope import Rope
from kvote.store.answers import answers, received
from kvote.store.pages import PAGE, Lane
from kvote.store.segment import Scaling
from kvote.store.uncompressed import UncompressedSegment
from kvote.tokens import Queries, TokenSet


class UnevenSegment(UncompressedSegment):
    """As ``UncompressedSegment``; where lanes differ, ranges are places, and what a lane has not got there is left out
    of answers, 0 in attention received and in tokens, and -inf in scores."""

    def __init__(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None) -> None:
        super().__init__(heads, like, value_dim, rope)
        # Whether key heads of a sequence differ in length.
        self.by_head = False

    def lengths(self, row: int) -> list[int]:
        """Tokens held by each key head of a sequence."""
        return [self.pool.lanes[i].length for i in self._lanes([row])]

    def length(self, row: int) -> int:
        """Of its longest key head."""
        return max(self.lengths(row)) if self.by_head else self.pool.lanes[row * self.heads].length

    def joins(self, query_heads: int) -> bool:
        """Whether sequences of any lengths are read in one call, a query each."""
        each = query_heads // self.heads
        return self.rope is None and not self.indexes and self._same_shape() and each <= self.kernels.MAX_QUERIES_PER_KV

    def _differ(self, rows: list[int]) -> bool:
        return self.by_head or (len(rows) > 1 and len({self.length(row) for row in rows}) > 1)

    def _begun(self, rows: list[int]) -> list[tuple[Lane, int]]:
        """The lanes of sequences, and the place at which each begins."""
        lanes = [self.pool.lanes[i] for i in self._lanes(rows)]
        longest = max(lane.length for lane in lanes)
        return [(lane, longest - lane.length) for lane in lanes]

    def _tokens(self, pool: Tensor, lane: Lane, start: int, stop: int) -> Tensor:
        """Tokens ``start`` to ``stop`` of a lane, [n, c]; a view where it lies in one run."""
        flat = pool.view(-1, pool.shape[-1])
        if len(lane.runs) == 1:
            first = lane.runs[0][0] * PAGE
            return flat[first + start : first + stop]
        return flat[self.pool.slots(lane, start, stop)]

    def _own(self, rows: list[int], start: int, stop: int) -> list[tuple[Lane, int, int]]:
        """Of each lane, the tokens that stand at the places ``start`` to ``stop``."""
        return [(lane, max(0, start - begin), max(0, stop - begin)) for lane, begin in self._begun(rows)]

    def attend(self, queries: Queries, rows: list[int], tokens: TokenSet, scaling: Scaling) -> tuple[Tensor, Tensor]:
        if not self._differ(rows):
            return super().attend(queries, rows, tokens, scaling)
        places = _range(tokens)
        own = self._own(rows, places.start, places.stop)
        b, heads, t, d = queries.rotated.shape
        if t == 1 and tokens.window is None and places.start == 0 and self.joins(heads):
            longest = max(stop for _, _, stop in own)
            out, lse = self.kernels.decode(
                queries.rotated[:, :, 0],
                self.pool.keys,
                self.pool.values,
                self.table(rows),
                range(longest),
                angles=None,
                interleaved=False,
                scale=scaling.scale,
                softcap=scaling.softcap,
                ends=[stop for _, _, stop in own],
            )
            return out.to(queries.rotated.dtype)[:, :, None], lse[:, :, None]
        query = queries.rotated.reshape(len(own), heads // self.heads, t, d)
        parts = [self._of_lane(query[i : i + 1], *each, tokens, scaling) for i, each in enumerate(own)]
        out, lse = (torch.cat(part) for part in zip(*parts, strict=True))
        return out.reshape(b, heads, t, -1), lse.reshape(b, heads, t)

    def _of_lane(
        self, query: Tensor, lane: Lane, start: int, stop: int, tokens: TokenSet, scaling: Scaling
    ) -> tuple[Tensor, Tensor]:
        """What queries [1, g, t, d] read in one lane."""
        key, value = (self._tokens(pool, lane, start, stop)[None, None] for pool in (self.pool.keys, self.pool.values))
        if stop <= start:
            out = query.new_zeros(*query.shape[:3], value.shape[-1])
            return out, torch.full(out.shape[:3], float("-inf"), device=out.device)
        return answers(query, key, value, replace(tokens, index=range(start, stop)), scaling)

    def attention_mass(
        self, queries: Queries, lse: Tensor, rows: list[int], tokens: TokenSet, scaling: Scaling
    ) -> Tensor:
        if not self._differ(rows):
            return super().attention_mass(queries, lse, rows, tokens, scaling)
        places = _range(tokens)
        _, heads, t, d = queries.rotated.shape
        own = self._own(rows, places.start, places.stop)
        query = queries.rotated.reshape(len(own), heads // self.heads, t, d)
        total = lse.reshape(len(own), heads // self.heads, t)
        mass = torch.zeros(len(own), len(places), device=lse.device)
        for i, (lane, start, stop) in enumerate(own):
            if stop > start:
                key = self._tokens(self.pool.keys, lane, start, stop)[None, None]
                its = replace(tokens, index=range(start, stop))
                mass[i, start - stop :] = received(query[i : i + 1], total[i : i + 1], key, its, scaling)[0, 0, 0]
        return mass.view(len(rows), self.heads, 1, len(places))

    def scores(self, query: Tensor, rows: list[int], start: int, stop: int) -> Tensor:
        if not self._differ(rows):
            return super().scores(query, rows, start, stop)
        b, heads, r, d = query.shape
        lanes = query.reshape(b * self.heads, heads // self.heads, r, d)
        out = torch.full((*lanes.shape[:3], stop - start), float("-inf"), device=query.device)
        for i, (lane, first, last) in enumerate(self._own(rows, start, stop)):
            if last > first:
                key = self._tokens(self.pool.keys, lane, first, last)[None, None]
                out[i, :, :, first - last :] = reference.scores(lanes[i : i + 1], key)[0].transpose(0, 1)
        return out.view(b, heads, r, -1).transpose(1, 2)

    def decode(self, rows: list[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        if not self._differ(rows):
            return super().decode(rows, start, stop)
        found = []
        for pool in (self.pool.keys, self.pool.values):
            out = pool.new_zeros(len(rows) * self.heads, stop - start, pool.shape[-1])
            for i, (lane, first, last) in enumerate(self._own(rows, start, stop)):
                if last > first:
                    out[i, first - last :] = self._tokens(pool, lane, first, last)
            found.append(out.view(len(rows), self.heads, stop - start, -1))
        return found[0], found[1]

    def keep(self, row: int, slots: Tensor, content: tuple[Tensor, Tensor] | None = None) -> None:
        """``slots``: places, [h, m]; -1, in front, where a key head keeps fewer than the others."""
        if not self.by_head and not (slots.dim() == 2 and bool((slots[:, :1] < 0).any())):
            super().keep(row, slots, content)
            return
        if content is not None:
            raise ValueError("Tokens are merged only where all key heads hold equally many.")
        self.by_head, self.alike = True, False
        pool, begun = self.pool, self._begun([row])
        rest: list[tuple[Lane, list[Tensor]]] = []
        for (lane, begin), places in zip(begun, slots.to(self.device).expand(self.heads, -1), strict=True):
            own = places[places >= 0] - begin
            # Up to the first token that moves, pages stay as they are and stay shared.
            moving = (own != torch.arange(len(own), device=own.device)).nonzero()
            moved = int(moving[0]) if len(moving) else len(own)
            old = pool.slots(lane, 0, lane.length)[own[moved:]]
            parts = (pool.keys, pool.values, pool.positions)
            rest.append((lane, [part.view(PAGE * part.shape[0], -1)[old] for part in parts]))
            pool.truncate(lane, moved)
        more = {id(lane): len(held[0]) for lane, held in rest}
        pool.grow([lane.length + more.get(id(lane), 0) for lane in pool.lanes])
        for lane, held in rest:
            if count := len(held[0]):
                at = pool.slots(lane, lane.length, lane.length + count)
                for part, new in zip((pool.keys, pool.values, pool.positions), held, strict=True):
                    part.view(PAGE * part.shape[0], -1)[at] = new
                lane.length += count
        pool.trim()

    def truncate(self, row: int, length: int) -> None:
        gone = self.length(row) - length
        for i in self._lanes([row]):
            lane = self.pool.lanes[i]
            self.pool.truncate(lane, max(0, lane.length - gone))


def _range(tokens: TokenSet) -> range:
    if not isinstance(tokens.index, range):
        raise ValueError("Where lanes differ in length, tokens are read by ranges only.")
    return tokens.index
