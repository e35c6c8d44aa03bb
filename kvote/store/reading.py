"""What queries read in regions side by side: each answers for its own tokens, and answers are merged by log-sum-exp."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kvote import kernels
from kvote.kernels import reference
from kvote.kernels.contract import Answer
from kvote.rope import Angles
from kvote.store.answers import angles_at, answers, asked_by, received
from kvote.store.packed import BLOCK
from kvote.store.region import Region, Slots
from kvote.store.regions import Regions
from kvote.store.segment import Scaling
from kvote.tokens import Queries, TokenSet


class ReadRegions(Regions):
    """Regions as readers and keepers see them; functions as in ``Segment``."""

    def slotless_attention(self, queries: Queries, rows: list[int], scaling: Scaling) -> Answer | None:
        return None

    def attend(self, queries: Queries, rows: list[int], tokens: TokenSet, scaling: Scaling) -> Answer:
        if len(rows) == 1:
            return self._attend(queries, rows, tokens, scaling)

        def some(part: list[int], at: slice | list[int]) -> Answer:
            its, own = asked_by(queries, tokens, at)
            return self._attend(its, part, own, scaling)

        out, lse = self.by_form(rows, some)
        return out, lse

    def _attend(self, queries: Queries, rows: list[int], tokens: TokenSet, scaling: Scaling) -> Answer:
        recent = self._recent(rows, tokens)
        if recent is not None:
            return self.uncompressed.attend(queries, rows, recent, scaling)
        if isinstance(tokens.index, Tensor):
            return self._attend_lists(queries, rows, tokens, scaling)
        if self.rope is None and not _cut_off(tokens) and queries.rotated.shape[2] == 1:
            answer = self._attend_at_once(queries.rotated, rows, tokens.index, scaling)
            if answer is not None:
                return answer
        parts = self._answers(queries, rows, tokens, tokens.index, scaling)
        out, lse = next(parts)
        for more in parts:
            out, lse = kernels.merge([(out.float(), lse), more])
        return out.to(queries.rotated.dtype), lse

    def _recent(self, rows: list[int], tokens: TokenSet) -> TokenSet | None:
        """``tokens`` as the uncompressed pages name them, if all lie there: while a prompt goes on, and for a range in
        which nothing is encoded."""
        n = self.encoded(rows[0])
        if isinstance(tokens.index, Tensor):
            return tokens if n == 0 else None
        if tokens.index.start < n:
            return None
        begin = self.begin(rows[0])
        return replace(tokens, index=range(tokens.index.start - begin, tokens.index.stop - begin))

    def _attend_at_once(self, query: Tensor, rows: list[int], index: range, scaling: Scaling) -> Answer | None:
        """One query's attention over the last region and the uncompressed tokens by one kernel call, as a decode step
        is short; None where no kernel can do that."""
        pieces = list(self.pieces(rows[0], index.start, index.stop))
        n, begin = self.encoded(rows[0]), self.begin(rows[0])
        if len(pieces) != 1 or index.stop <= n:
            return None
        region, slots, _ = pieces[0]
        recent = *self.uncompressed.held(rows), range(n - begin, index.stop - begin)
        answer = region.attend_with(query, rows, slots, recent, scaling)
        return None if answer is None else (answer[0].to(query.dtype), answer[1])

    def _answers(
        self, queries: Queries, rows: list[int], tokens: TokenSet, index: range, scaling: Scaling
    ) -> Iterator[Answer]:
        """Answers over a range, region by region."""
        query, n, begin = self.uncompressed.place_queries(queries, tokens), self.encoded(rows[0]), self.begin(rows[0])
        own = self.rope is not None and tokens.positions == "original"
        places = self.places(rows) if own else None
        for region, slots, offset in self.pieces(rows[0], index.start, index.stop):
            if self.rope is None and not _cut_off(tokens):
                answer = region.attend(query, rows, slots, None, scaling)
                if answer is not None:
                    yield answer
                    continue
            for start in range(slots.start, slots.stop, BLOCK):
                block = range(start, min(start + BLOCK, slots.stop))
                first = offset + start - index.start
                seen = self._seen(tokens, query.shape[2], range(first, first + len(block)))
                if seen is not None and not bool(seen.any()):
                    continue
                angles = self._angles(tokens, places, offset + start, len(block), index.start)
                if seen is None:
                    yield self._answer(region, query, rows, block, angles, scaling)
                else:
                    yield _masked(query, *self._turned(region, rows, block, angles), seen, scaling)
        if index.stop <= n:
            return
        start = max(index.start, n)
        rest = replace(tokens, index=range(start - begin, index.stop - begin))
        angles = self._angles(tokens, None, start, index.stop - start, index.start)
        if self.rope is None or angles is None:
            yield self.uncompressed.attend(queries, rows, rest, scaling)
            return
        key, value = self.uncompressed.decode(rows, start - begin, index.stop - begin)
        yield answers(query, self.rope.apply(key, angles), value, rest, scaling)

    def _seen(self, tokens: TokenSet, t: int, places: range) -> Tensor | None:
        """Which tokens [t, n], at ``places`` in the list, each query row still has in its window; None: all rows have
        all of them."""
        if not _cut_off(tokens) or tokens.window is None:
            return None
        last = len(tokens) - (t if tokens.causal else 0) + torch.arange(t, device=self.device)[:, None]
        return torch.arange(places.start, places.stop, device=self.device) > last - tokens.window

    def _angles(self, tokens: TokenSet, places: Tensor | None, start: int, count: int, first: int) -> Angles | None:
        """Angles of ``count`` tokens from ``start`` on, of a range that begins with ``first``: where the set places
        them, or at the ``places`` [b, h, n] where all tokens stand in the text."""
        if self.rope is None:
            return None
        if tokens.positions != "original":
            angles = self.uncompressed.angles(tokens)
            assert angles is not None
            return angles[0][start - first : start - first + count], angles[1][start - first : start - first + count]
        return None if places is None else angles_at(self.rope, places[..., start : start + count])

    def _turned(self, region: Region, rows: list[int], slots: Slots, angles: Angles | None) -> tuple[Tensor, Tensor]:
        """Tokens as they decode, the keys where they stand for the queries."""
        key, value = region.decode(rows, slots)
        return (key if angles is None or self.rope is None else self.rope.apply(key, angles)), value

    def _answer(
        self, region: Region, query: Tensor, rows: list[int], slots: Slots, angles: Angles | None, scaling: Scaling
    ) -> Answer:
        """What queries read in tokens that they all see."""
        answer = region.attend(query, rows, slots, angles, scaling)
        if answer is not None:
            return answer
        key, value = self._turned(region, rows, slots, angles)
        return kernels.attend(query, key, value, scale=scaling.scale, softcap=scaling.softcap, causal=False)

    # Lists.

    def _attend_lists(self, queries: Queries, rows: list[int], tokens: TokenSet, scaling: Scaling) -> Answer:
        """Every block of queries reads a list of its own; one list at a time is decoded."""
        apart = not tokens.by_head and not _cut_off(tokens) and any(region.lists for region in self.regions)
        parts = []
        for query, own, _ in self._blocks(queries, tokens):
            read = self._attend_apart if apart else self._attend_list
            parts.append(read(query, rows, own, scaling))
        return _side_by_side(parts, dim=2)

    def _attend_list(self, query: Tensor, rows: list[int], tokens: TokenSet, scaling: Scaling) -> Answer:
        return answers(query, *self._listed(rows, tokens), tokens, scaling)

    def _blocks(self, queries: Queries, tokens: TokenSet) -> Iterator[tuple[Tensor, TokenSet, slice]]:
        """Each block of queries, where it stands for its list, that list, and which rows it is."""
        assert isinstance(tokens.index, Tensor)
        each = queries.rotated.shape[2] // tokens.blocks
        for j in range(tokens.blocks):
            own, at = replace(tokens, index=tokens.index[..., j : j + 1, :]), slice(j * each, (j + 1) * each)
            yield self.uncompressed.place_queries(queries.rows(at.start, at.stop), own), own, at

    def _listed(self, rows: list[int], tokens: TokenSet) -> tuple[Tensor, Tensor]:
        """Keys, where they stand for the queries, and values [b, h, m, c] of one list [b, 1, m] per sequence, or
        [b, heads, 1, m] per query head, which makes h as many heads."""
        assert isinstance(tokens.index, Tensor)
        index = tokens.index[..., 0, :].contiguous()
        key, value = self.listed(rows, index)
        angles = self._angles_of_lists(rows, tokens, index if tokens.by_head else index[:, None])
        return (key if angles is None or self.rope is None else self.rope.apply(key, angles)), value

    def _angles_of_lists(self, rows: list[int], tokens: TokenSet, lists: Tensor) -> Angles | None:
        """Angles [m, r] or [b, 1, h or heads, m, r] of ``lists`` [b, 1 or heads, m]."""
        if self.rope is None or tokens.positions != "original":
            return self.uncompressed.angles(tokens)
        places = self.places(rows)
        kinds = max(places.shape[1], lists.shape[1])
        places = places.repeat_interleave(kinds // places.shape[1], dim=1)
        return angles_at(self.rope, places.gather(2, lists.expand(-1, kinds, -1)))

    def _attend_apart(self, query: Tensor, rows: list[int], tokens: TokenSet, scaling: Scaling) -> Answer:
        """The same where a region reads its part of a list with less work than it takes to decode it."""
        assert isinstance(tokens.index, Tensor)
        each = []
        for i, row in enumerate(rows):
            index = tokens.index[i, 0]
            angles = self._angles_of_lists([row], tokens, index[None, None])
            each.append(self._pieces_of_list(query[i : i + 1], row, index, angles, tokens.causal, scaling))
        return _side_by_side(each, dim=0)

    def _pieces_of_list(
        self, query: Tensor, row: int, index: Tensor, angles: Angles | None, causal: bool, scaling: Scaling
    ) -> Answer:
        """What ``query`` [1, heads, t, d] reads in a list [m]. Its own tokens, if they are among them, are
        uncompressed, so all that is encoded is seen by all rows."""
        parts, done = [], 0
        for region, slots, offset in self.pieces(row, 0, self.encoded(row)):
            stop = int((index < offset + slots.stop).sum())
            if stop > done:
                some = (index[done:stop] - offset)[None]
                parts.append(self._answer(region, query, [row], some, _cut(angles, done, stop), scaling))
            done = max(done, stop)
        if done < len(index):
            recent = TokenSet((index[done:] - self.begin(row))[None, None], causal=causal)
            key, value, _ = self.uncompressed.read([row], recent)
            turn = _cut(angles, done, len(index))
            key = key if turn is None or self.rope is None else self.rope.apply(key, turn)
            parts.append(answers(query, key, value, recent, scaling))
        return kernels.merge(parts)

    # Scores, and what was read.

    def attention_mass(
        self, queries: Queries, lse: Tensor, rows: list[int], tokens: TokenSet, scaling: Scaling
    ) -> Tensor:
        def some(part: list[int], at: slice | list[int]) -> tuple[Tensor]:
            its, own = asked_by(queries, tokens, at)
            return (self._mass(its, lse[at], part, own, scaling),)

        return self.by_form(rows, some)[0]

    def _mass(self, queries: Queries, lse: Tensor, rows: list[int], tokens: TokenSet, scaling: Scaling) -> Tensor:
        recent, index = self._recent(rows, tokens), tokens.index
        if recent is not None:
            return self.uncompressed.attention_mass(queries, lse, rows, recent, scaling)
        if isinstance(index, Tensor):
            pieces = [
                received(query, lse[:, :, at], self._listed(rows, own)[0], own, scaling)
                for query, own, at in self._blocks(queries, tokens)
            ]
            return torch.cat(pieces, dim=2)
        n, begin = self.encoded(rows[0]), self.begin(rows[0])
        if index.stop <= n or self.rope is not None or tokens.window is not None:
            key = self.tokens(rows, index.start, index.stop)[0]
            if self.rope is not None:
                places = self.places(rows) if tokens.positions == "original" else None
                angles = self._angles(tokens, places, index.start, len(index), index.start)
                key = key if angles is None else self.rope.apply(key, angles)
            return received(self.uncompressed.place_queries(queries, tokens), lse, key, tokens, scaling)
        pieces = []
        for region, slots, _ in self.pieces(rows[0], index.start, n):
            for start in range(slots.start, slots.stop, BLOCK):
                key = region.decode(rows, range(start, min(start + BLOCK, slots.stop)))[0]
                pieces.append(
                    kernels.attention_mass(
                        queries.rotated, lse, key, causal=False, scale=scaling.scale, softcap=scaling.softcap
                    )[:, :, None]
                )
        rest = range(max(index.start, n) - begin, index.stop - begin)
        pieces.append(self.uncompressed.attention_mass(queries, lse, rows, replace(tokens, index=rest), scaling))
        return torch.cat(pieces, dim=-1)

    def scores(self, query: Tensor, rows: list[int], start: int, stop: int) -> Tensor:
        def some(part: list[int], at: slice | list[int]) -> tuple[Tensor]:
            n, begin = self.encoded(part[0]), self.begin(part[0])
            pieces = [region.scores(query[at], part, slots) for region, slots, _ in self.pieces(part[0], start, stop)]
            if stop > n:
                pieces.append(self.uncompressed.scores(query[at], part, max(start, n) - begin, stop - begin))
            return (torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0],)

        return self.by_form(rows, some)[0]

    def votes(self, query: Tensor, rows: list[int], start: int, limits: list[int]) -> Tensor:
        if not any(self.encoded(row) for row in rows):
            return self.uncompressed.votes(query, rows, start, limits)
        return kernels.votes_within(self.scores(query, rows, start, max(limits)), start, limits)

    def winners(self, query: Tensor, rows: list[int], start: int, limits: list[int], k: int) -> Tensor:
        if not any(self.encoded(row) for row in rows):
            return self.uncompressed.winners(query, rows, start, limits, k)
        return kernels.winners_within(self.votes(query, rows, start, limits), start, limits, k)

    def decode(self, rows: list[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        key, value = self.by_form(rows, lambda part, _: self.tokens(part, start, stop))
        return key, value


def _cut_off(tokens: TokenSet) -> bool:
    """Whether a window hides some of the tokens from some rows."""
    return tokens.window is not None and tokens.window < len(tokens)


def _cut(angles: Angles | None, start: int, stop: int) -> Angles | None:
    return None if angles is None else (angles[0][..., start:stop, :], angles[1][..., start:stop, :])


def _side_by_side(parts: list[Answer], dim: int) -> Answer:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], dim=dim), torch.cat([lse for _, lse in parts], dim=dim)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: Scaling) -> Answer:
    """Attention under a mask [t, m], some rows at a time, so that the logits stay small."""
    rows = max(1, (1 << 24) // (query.shape[0] * query.shape[1] * key.shape[2]))
    parts = [
        reference.attend(
            query[:, :, i : i + rows], key, value, scale=scaling.scale, softcap=scaling.softcap, mask=mask[i : i + rows]
        )
        for i in range(0, query.shape[2], rows)
    ]
    return _side_by_side(parts, dim=2)
