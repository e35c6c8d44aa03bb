"""Quantised segments: a packed body and, behind it, the most recent tokens as the model made them.

Of n tokens, keys are packed in whole runs of ``residual`` tokens, floor(n / residual) * residual of them, and values as
soon as ``residual`` younger ones exist, max(0, n - residual) of them. Each token is packed once. Tokens whose values
are packed are the body; all others lie in a raw segment, where a key that is packed already is replaced by what it
decodes to. So there are two regions, and their answers are merged by their log-sum-exp.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvote import kernels
from kvote.kernels import reference
from kvote.kernels.contract import Tail
from kvote.kernels.packing import PACKED, Packing
from kvote.memory import storage_bytes
from kvote.needs import Needs, StoreOffers
from kvote.read.tokens import Queries, TokenSet
from kvote.rope import Rope
from kvote.store import packed
from kvote.store.answers import angles_at, answers, asked_by, received
from kvote.store.packed import BLOCK, PackedLanes
from kvote.store.pages import PAGE, PagePool
from kvote.store.raw import RawSegment
from kvote.store.segment import NO_INDEXES, Logits, Segment

Answer = tuple[Tensor, Tensor]


class QuantisedSegment:
    """Tokens of a layer of which all but the most recent are packed. With a ``rope``, keys are packed at position 0 and
    rotated when they are read; without, as the model rotated them."""

    indexes = NO_INDEXES
    skips = False

    def __init__(
        self, heads: int, like: Tensor, value_dim: int, rope: Rope | None, *, bits: int, group: int, residual: int
    ) -> None:
        self.heads, self.rope, self.group, self.residual = heads, rope, group, residual
        self.raw = RawSegment(heads, like, value_dim, rope)
        backend = kernels.chosen(like, like.new_empty(0, value_dim))
        keys = Packing(bits, group, like.shape[-1], like.dtype, are_keys=True)
        values = Packing(bits, group, value_dim, like.dtype, are_keys=False)
        self.keys = PackedLanes(heads, keys, like.device, backend=backend)
        self.values = PackedLanes(heads, values, like.device, backend=backend)
        # Of each sequence: the token at which the raw segment begins (whole pages before the body's end are given
        # back), the positions of those before it, int32 [1 or heads, tokens], and whether all heads hold the same
        # tokens, which the device would have to be asked for.
        self._first: list[int] = []
        self._before: list[Tensor] = []
        self._alike: list[bool] = []

    @property
    def sequences(self) -> int:
        return self.raw.sequences

    @property
    def device(self) -> torch.device:
        return self.raw.device

    @property
    def pools(self) -> list[PagePool]:
        return [self.raw.pool, self.keys.pool, self.values.pool]

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self.pools) + storage_bytes(self._before)

    def length(self, row: int) -> int:
        return self._first[row] + self.raw.length(row)

    def add_sequences(self, count: int) -> None:
        for part in (self.raw, self.keys, self.values):
            part.add_sequences(count)
        self._first += [0] * count
        self._before += [torch.empty(1, 0, dtype=torch.int32, device=self.device)] * count
        self._alike += [True] * count

    def reserve(self, tokens: int) -> None:
        """A prompt is raw until it ends, so room is made where raw tokens lie."""
        self.raw.reserve(tokens)

    def append(self, rows: list[int], key: Tensor, value: Tensor, positions: Tensor) -> None:
        self.raw.append(rows, key, value, positions)

    def watch(self, queries: Queries, rows: list[int], ahead: int | None) -> None:
        pass

    def aside(self, queries: Queries, rows: list[int], logits: Logits) -> None:
        return None

    # Packing.

    def mark(self) -> list[int]:
        """New tokens are raw until they are sealed."""
        return self.raw.mark()

    def restore(self, mark: list[int]) -> bool:
        return self.raw.restore(mark)

    def seal(self, ahead: int) -> bool:
        """Packs what is old enough, once the prompt has ended: until then its own queries read it as it is."""
        if ahead:
            return False
        alike: dict[tuple[int, ...], list[int]] = {}
        for row in range(self.sequences):
            alike.setdefault((self.length(row), *self._state(row)), []).append(row)
        before = [self._state(row)[:2] for row in range(self.sequences)]
        freed = [self._seal(rows) for rows in alike.values()]
        if any(freed):
            self.raw.trim()
        return before != [self._state(row)[:2] for row in range(self.sequences)]

    def _state(self, row: int) -> tuple[int, int, int]:
        """Keys packed, values packed, and the token at which the raw segment begins."""
        return self.keys.length(row), self.values.length(row), self._first[row]

    def _seal(self, rows: list[int]) -> bool:
        """Packs what is old enough of rows alike; whether raw pages became free."""
        n, (keys, values, first) = self.length(rows[0]), self._state(rows[0])
        more_keys, more_values = max(keys, n // self.residual * self.residual), max(values, n - self.residual)
        if (more_keys, more_values) == (keys, values):
            return False
        raw = self.raw.pool
        whole = (self.keys, keys, more_keys, raw.keys), (self.values, values, more_values, raw.values)
        for part, done, until, pool in whole:
            if until - done > BLOCK:
                part.reserve(rows, until - done)
            for start in range(done, until, BLOCK):
                stop = min(start + BLOCK, until)
                part.append(rows, self.raw._view(pool, rows, start - first, stop - first))
        if more_keys > keys:
            self._replace_keys(rows, max(keys, more_values), more_keys)
        self._give_back(rows, (more_values - first) // PAGE)
        return self._state(rows[0])[2] > first or more_keys > keys

    def _replace_keys(self, rows: list[int], start: int, stop: int) -> None:
        """Makes raw keys of some tokens what they decode to; what follows them stays."""
        first, n = self._first[rows[0]], self.length(rows[0])
        if start >= stop:
            return
        key, value, positions = self._raw_tokens(rows, start - first, n - first)
        key[:, :, : stop - start] = self.keys.unpack(rows, range(start, stop))
        for row in rows:
            self.raw.truncate(row, start - first)
        self.raw.put(rows, key, value, positions)

    def _raw_tokens(self, rows: list[int], start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of keys, values and positions [b, h, t, ...] of the raw segment's tokens."""
        key, value = self.raw.decode(rows, start, stop)
        positions = torch.stack([torch.stack(self.raw.positions(row))[:, start:stop] for row in rows])
        return key.clone(), value.clone(), positions

    def _give_back(self, rows: list[int], pages: int) -> None:
        """Forgets whole raw pages whose tokens are packed."""
        if pages <= 0:
            return
        for row in rows:
            known = torch.stack(self.raw.positions(row)[: self._kinds(row)])[:, : pages * PAGE]
            self._before[row] = _joined(self._before[row], known)
            self._first[row] += pages * PAGE
            for i in range(row * self.heads, (row + 1) * self.heads):
                self.raw.pool.drop_front(self.raw.pool.lanes[i], pages)

    def _kinds(self, row: int) -> int:
        """How many heads have positions of their own: one for all while they hold the same tokens."""
        return 1 if self._alike[row] else self.heads

    # Reading.

    def _bodies(self, rows: list[int]) -> list[list[int]]:
        """Rows whose bodies are equally long."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for row in rows:
            alike.setdefault(self._state(row), []).append(row)
        return list(alike.values())

    def _by_body(
        self, rows: list[int], call: Callable[[list[int], slice | list[int]], tuple[Tensor, ...]]
    ) -> list[Tensor]:
        """Joins, in the order of ``rows``, what ``call`` gives for rows alike and where they stand among all."""
        parts = self._bodies(rows)
        if len(parts) == 1:
            return list(call(rows, slice(None)))
        places = [[rows.index(row) for row in part] for part in parts]
        each = [call(part, place) for part, place in zip(parts, places, strict=True)]
        order = torch.tensor([i for place in places for i in place], device=self.device).argsort()
        return [torch.cat(part)[order] for part in zip(*each, strict=True)]

    def attend(self, queries: Queries, rows: list[int], tokens: TokenSet, logits: Logits) -> Answer:
        def some(part: list[int], at: slice | list[int]) -> Answer:
            its, own = asked_by(queries, tokens, at)
            return self._attend(its, part, own, logits)

        if len(rows) == 1:
            return self._attend(queries, rows, tokens, logits)
        out, lse = self._by_body(rows, some)
        return out, lse

    def _attend(self, queries: Queries, rows: list[int], tokens: TokenSet, logits: Logits) -> Answer:
        body, first, index = self.values.length(rows[0]), self._first[rows[0]], tokens.index
        recent = self._recent(rows, tokens)
        if recent is not None:
            return self.raw.attend(queries, rows, recent, logits)
        if isinstance(index, Tensor):
            return self._attend_lists(queries, rows, tokens, logits)
        if self.rope is not None or (tokens.window is not None and tokens.window < len(tokens)):
            return _merged(queries.rotated, self._answers(queries, rows, tokens, logits))
        if index.start < body < index.stop and queries.rotated.shape[2] == 1:
            answer = self._attend_both(queries.rotated, rows, index, logits)
            if answer is not None:
                return answer
        parts = []
        if index.start < body:
            parts.append(self._attend_body(queries.rotated, rows, range(index.start, min(index.stop, body)), logits))
        if index.stop > body:
            rest = range(max(index.start, body) - first, index.stop - first)
            parts.append(self.raw.attend(queries, rows, replace(tokens, index=rest), logits))
        return _merged(queries.rotated, iter(parts))

    def _attend_both(self, query: Tensor, rows: list[int], tokens: range, logits: Logits) -> Answer | None:
        """One query's attention over packed and over raw tokens by one kernel call, as a decode step is short; None
        where no kernel can do that."""
        body, first = self.values.length(rows[0]), self._first[rows[0]]
        recent = *self.raw.held(rows), range(body - first, tokens.stop - first)
        scale, softcap, old = logits.scale, logits.softcap, range(tokens.start, body)
        answer = packed.attend(query, self.keys, self.values, rows, old, recent=recent, scale=scale, softcap=softcap)
        return None if answer is None else (answer[0].to(query.dtype), answer[1])

    def _recent(self, rows: list[int], tokens: TokenSet) -> TokenSet | None:
        """``tokens`` as the raw segment names them, if it holds them all: while a prompt goes on, and for a range that
        the body has no part in."""
        body, first = self.values.length(rows[0]), self._first[rows[0]]
        if isinstance(tokens.index, Tensor):
            return tokens if body == 0 else None
        if tokens.index.start < body:
            return None
        return replace(tokens, index=range(tokens.index.start - first, tokens.index.stop - first))

    def _attend_body(self, query: Tensor, rows: list[int], tokens: range, logits: Logits) -> Answer:
        """Attention over packed tokens that all queries see."""
        answer = packed.attend(query, self.keys, self.values, rows, tokens, scale=logits.scale, softcap=logits.softcap)
        if answer is not None:
            return answer

        def blocks() -> Iterator[Answer]:
            for start in range(tokens.start, tokens.stop, BLOCK):
                block = range(start, min(start + BLOCK, tokens.stop))
                key, value = self.keys.unpack(rows, block), self.values.unpack(rows, block)
                yield kernels.attend(query, key, value, causal=False, scale=logits.scale, softcap=logits.softcap)

        return _merged(query, blocks())

    def _answers(self, queries: Queries, rows: list[int], tokens: TokenSet, logits: Logits) -> Iterator[Answer]:
        """Answers over a range, a block of tokens at a time: where keys must be rotated, or rows see a window."""
        index, m, t = tokens.index, len(tokens), queries.rotated.shape[2]
        assert isinstance(index, range)
        query = self.raw.place_queries(queries, tokens)
        # The queries themselves, at the end of a causal list, are a block of their own.
        past = m - t if tokens.causal else m
        blocks = [(i, min(i + BLOCK, past)) for i in range(0, past, BLOCK)] + ([(past, m)] if tokens.causal else [])
        last = past + torch.arange(t, device=self.device)[:, None]
        for start, stop in blocks:
            key, value, positions = self._tokens(rows, index.start + start, index.start + stop)
            if self.rope is not None:
                if tokens.positions != "original":
                    angles = self.raw.angles(tokens)
                    assert angles is not None
                    key = self.rope.apply(key, (angles[0][start:stop], angles[1][start:stop]))
                else:
                    key = self.rope.apply(key, angles_at(self.rope, positions))
            if start == past or tokens.window is None:
                yield kernels.attend(
                    query,
                    key,
                    value,
                    scale=logits.scale,
                    softcap=logits.softcap,
                    causal=start == past,
                    window=tokens.window if start == past else None,
                )
                continue
            seen = torch.arange(start, stop, device=self.device) > last - tokens.window
            if bool(seen.any()):
                yield _masked(query, key, value, seen, logits)

    def _attend_lists(self, queries: Queries, rows: list[int], tokens: TokenSet, logits: Logits) -> Answer:
        """Every block of queries reads a list of its own; one list at a time is decoded."""
        assert isinstance(tokens.index, Tensor)
        each = queries.rotated.shape[2] // tokens.blocks
        parts = []
        for j in range(tokens.blocks):
            own = replace(tokens, index=tokens.index[..., j : j + 1, :])
            query = self.raw.place_queries(queries.rows(j * each, (j + 1) * each), own)
            read = self._read_list if each == 1 and self._streams(query, own) else self._decode_list
            parts.append(read(query, rows, own, logits))
        if len(parts) == 1:
            return parts[0]
        return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)

    def _streams(self, query: Tensor, tokens: TokenSet) -> bool:
        """Whether a kernel reads a list for one query straight from the pages."""
        placed = self.rope is None or tokens.positions == "contiguous"
        groups = 1 if tokens.by_head else query.shape[1] // self.heads
        seen = tokens.window is None or tokens.window >= len(tokens)
        return placed and seen and self.keys.reads(groups) and self.keys.form.dim == self.values.form.dim

    def _read_list(self, query: Tensor, rows: list[int], tokens: TokenSet, logits: Logits) -> Answer:
        """Attention of ``query`` [b, heads, 1, d], each sequence or each query head reading a list of its own."""
        assert isinstance(tokens.index, Tensor)
        b, heads, _, d = query.shape
        # To the kernel, a head with a list of its own is a sequence of one head.
        each = heads // self.heads if tokens.by_head else 0
        out, lse = self.keys.backend.packed.decode(
            query[:, :, 0] if not tokens.by_head else query.reshape(-1, 1, d),
            self.keys.held(rows, each),
            self.values.held(rows, each),
            self._tail(rows, each),
            tokens.index[..., 0, :].reshape(-1, len(tokens)).contiguous(),
            angles=self.raw.angles(tokens),
            interleaved=self.rope is not None and self.rope.interleaved,
            scale=logits.scale,
            softcap=logits.softcap,
        )
        return out.to(query.dtype).view(b, heads, 1, -1), lse.view(b, heads, 1)

    def _decode_list(self, query: Tensor, rows: list[int], tokens: TokenSet, logits: Logits) -> Answer:
        return answers(query, *self._listed(rows, tokens), tokens, logits)

    def _listed(self, rows: list[int], tokens: TokenSet) -> tuple[Tensor, Tensor]:
        """Keys, where they stand for the queries, and values [b, h, m, c] of one list [b, 1, m] per sequence, or
        [b, heads, 1, m] per query head, which makes h as many heads."""
        assert isinstance(tokens.index, Tensor)
        index = tokens.index[..., 0, :].contiguous()
        each = index if tokens.by_head else index[:, None]
        key, value = self._held(rows, index)
        if self.rope is None:
            return key, value
        if tokens.positions == "original":
            held = torch.stack([torch.stack(self.positions(row)) for row in rows])
            heads = key.shape[1]
            held = held.repeat_interleave(heads // self.heads, dim=1)
            positions = held.gather(2, each.expand(-1, heads, -1))
            return self.rope.apply(key, angles_at(self.rope, positions)), value
        angles = self.raw.angles(tokens)
        assert angles is not None
        return self.rope.apply(key, angles), value

    def _held(self, rows: list[int], index: Tensor) -> Answer:
        """Keys and values [b, h, m, c], as they are held, of one list [b, m] per sequence, or [b, heads, m] per query
        head, which makes h as many heads."""
        body, first, m = self.values.length(rows[0]), self._first[rows[0]], index.shape[-1]
        # Lists ascend, so what is packed comes first: in all of them at least so many tokens, at most so many.
        counts = (index < body).sum(dim=-1)
        least, most = int(counts.min()), int(counts.max())
        if most == 0:
            return self.raw.read(rows, TokenSet((index - first)[..., None, :]))[:2]
        old = index[..., :most].clamp(max=body - 1).contiguous()
        key, value = (part.unpack(rows, old, room=m - most) for part in (self.keys, self.values))
        if least == m:
            return key, value
        # Only the last tokens of a list can be raw ones.
        late = index[..., least:]
        recent = self.raw.read(rows, TokenSet((late - first).clamp(min=0)[..., None, :]))
        where = (late >= body)[..., None]
        for held, raw in zip((key, value), recent[:2], strict=True):
            last = held[:, :, least:]
            last.copy_(raw if least == most else torch.where(where if index.dim() == 3 else where[:, None], raw, last))
        return key, value

    def attention_mass(
        self, queries: Queries, lse: Tensor, rows: list[int], tokens: TokenSet, logits: Logits
    ) -> Tensor:
        def some(part: list[int], at: slice | list[int]) -> tuple[Tensor]:
            its, own = asked_by(queries, tokens, at)
            return (self._mass(its, lse[at], part, own, logits),)

        return self._by_body(rows, some)[0]

    def _mass(self, queries: Queries, lse: Tensor, rows: list[int], tokens: TokenSet, logits: Logits) -> Tensor:
        body, first, index = self.values.length(rows[0]), self._first[rows[0]], tokens.index
        recent = self._recent(rows, tokens)
        if recent is not None:
            return self.raw.attention_mass(queries, lse, rows, recent, logits)
        if isinstance(index, Tensor):
            each, pieces = queries.rotated.shape[2] // tokens.blocks, []
            for j in range(tokens.blocks):
                own, at = replace(tokens, index=index[..., j : j + 1, :]), slice(j * each, (j + 1) * each)
                query = self.raw.place_queries(queries.rows(at.start, at.stop), own)
                pieces.append(received(query, lse[:, :, at], self._listed(rows, own)[0], own, logits))
            return torch.cat(pieces, dim=2)
        if index.stop <= body or self.rope is not None or tokens.window is not None:
            key, _, positions = self._tokens(rows, index.start, index.stop)
            query = self.raw.place_queries(queries, tokens)
            if self.rope is not None:
                placed = self.raw.angles(tokens) if tokens.positions != "original" else None
                key = self.rope.apply(key, placed or angles_at(self.rope, positions))
            return received(query, lse, key, tokens, logits)
        pieces = []
        for start in range(index.start, min(index.stop, body), BLOCK):
            key = self.keys.unpack(rows, range(start, min(start + BLOCK, index.stop, body)))
            pieces.append(
                kernels.attention_mass(
                    queries.rotated, lse, key, causal=False, scale=logits.scale, softcap=logits.softcap
                )[:, :, None]
            )
        rest = range(max(index.start, body) - first, index.stop - first)
        pieces.append(self.raw.attention_mass(queries, lse, rows, replace(tokens, index=rest), logits))
        return torch.cat(pieces, dim=-1)

    def scores(self, query: Tensor, rows: list[int], start: int, stop: int) -> Tensor:
        def some(part: list[int], at: slice | list[int]) -> tuple[Tensor]:
            body, first, pieces = self.values.length(part[0]), self._first[part[0]], []
            if start < body:
                pieces.append(packed.scores(query[at], self.keys, part, range(start, min(stop, body))))
            if stop > body:
                pieces.append(self.raw.scores(query[at], part, max(start, body) - first, stop - first))
            return (torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0],)

        return self._by_body(rows, some)[0]

    def votes(self, query: Tensor, rows: list[int], start: int, limits: list[int]) -> Tensor:
        if self._is_raw(rows):
            return self.raw.votes(query, rows, start, limits)
        return self.keys.backend.packed.votes(query, self.keys.held(rows), self._tail(rows), start, limits)

    def winners(self, query: Tensor, rows: list[int], start: int, limits: list[int], k: int) -> Tensor:
        if self._is_raw(rows):
            return self.raw.winners(query, rows, start, limits, k)
        return self.keys.backend.packed.select(query, self.keys.held(rows), self._tail(rows), start, limits, k)

    def _tail(self, rows: list[int], each: int = 0) -> Tail:
        """What is not packed, as kernels read it behind what is; ``each`` as in ``PackedLanes.held``."""
        times = max(1, each * self.heads)
        packed = [self.values.length(row) for row in rows for _ in range(times)]
        return Tail(*self.raw.held(rows, each), packed, [self._first[row] for row in rows for _ in range(times)])

    def _is_raw(self, rows: list[int]) -> bool:
        """Whether nothing of these sequences is packed."""
        return not any(self.values.length(row) for row in rows)

    def decode(self, rows: list[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        def some(part: list[int], at: slice | list[int]) -> tuple[Tensor, Tensor]:
            return self._tokens(part, start, stop)[:2]

        key, value = self._by_body(rows, some)
        return key, value

    def _tokens(self, rows: list[int], start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and positions [b, h, n, ...] of rows with equally long bodies, decoded where they are packed."""
        body, first = self.values.length(rows[0]), self._first[rows[0]]
        held = torch.stack([torch.stack(self.positions(row))[:, start:stop] for row in rows])
        if start >= body:
            return *self.raw.decode(rows, start - first, stop - first), held
        old = range(start, min(stop, body))
        key, value = self.keys.unpack(rows, old), self.values.unpack(rows, old)
        if stop > body:
            recent = self.raw.decode(rows, body - first, stop - first)
            key, value = torch.cat([key, recent[0]], dim=2), torch.cat([value, recent[1]], dim=2)
        return key, value, held

    def positions(self, row: int) -> list[Tensor]:
        before = self._before[row].expand(self.heads, -1)
        return [torch.cat(pair) for pair in zip(before, self.raw.positions(row), strict=True)]

    # Taking tokens away.

    def keep(self, row: int, slots: Tensor, content: tuple[Tensor, Tensor] | None = None) -> None:
        """As ``Segment.keep``. From the first token that moves on, what stays is decoded, and packed anew by the next
        ``seal``."""
        slots = slots.to(self.device).expand(self.heads, -1)
        moving = (slots != torch.arange(slots.shape[1], device=self.device)).any(dim=0)
        start = int(moving.int().argmax()) if bool(moving.any()) else slots.shape[1]
        start = 0 if content is not None else start
        self._alike[row] = self._alike[row] and bool((slots == slots[:1]).all())
        n = self.length(row)
        key, value, positions = self._tokens([row], start, n)
        chosen = slots[:, start:] - start
        positions = positions.gather(2, chosen[None])
        if content is None:
            key, value = (x.gather(2, chosen[None, :, :, None].expand(-1, -1, -1, x.shape[-1])) for x in (key, value))
        else:
            key, value = (new[None].to(old.dtype) for new, old in zip(content, (key, value), strict=True))
        self.truncate(row, start)
        if chosen.shape[1]:
            self.raw.put([row], key, value, positions)
        self.trim()

    def truncate(self, row: int, length: int) -> None:
        """Forgets the last tokens of a sequence. Tokens of a group of keys that is cut become raw again, as they
        decode; they are packed a second time when their group is full again."""
        keys, values, first = self._state(row)
        kept_keys = keys if length >= keys else length // self.group * self.group
        kept_values = min(values, kept_keys)
        if kept_values == values and length >= first:
            self.raw.truncate(row, length - first)
        else:
            again = [part.clone() for part in self._tokens([row], kept_values, length)]
            self._before[row] = torch.stack(self.positions(row)[: self._kinds(row)])[:, :kept_values].clone()
            self._first[row] = kept_values
            self.raw.truncate(row, 0)
            if length > kept_values:
                self.raw.put([row], *again)
        self.keys.truncate(row, kept_keys)
        self.values.truncate(row, kept_values)

    def select(self, index: list[int]) -> None:
        for part in (self.raw, self.keys, self.values):
            part.select(index)
        self._first = [self._first[i] for i in index]
        self._before = [self._before[i] for i in index]
        self._alike = [self._alike[i] for i in index]

    def trim(self) -> None:
        for pool in self.pools:
            pool.trim()

    def tokens_within(self, nbytes: float, beside: int = 0) -> int:
        raw = self.raw.tokens_within(nbytes, beside)
        lanes = max(1, self.sequences * self.heads)
        # The residual, as many keys that wait for their run to be full, and unfilled pages.
        recent = 2 * self.residual + 4 * PAGE
        each = self.raw.pool.parts
        spent = recent * sum(part[:0].element_size() * part.shape[1:].numel() for part in each.values()) / PAGE
        packed_bytes = (self.keys.token_bytes + self.values.token_bytes + beside + 4) * (1 + 1 / self.keys.pool.room)
        return max(raw, int((nbytes / lanes - spent) / packed_bytes))


def _joined(before: Tensor, more: Tensor) -> Tensor:
    """Positions [1 or heads, n] and [1 or heads, m] side by side, once where they are the same in every head."""
    if not before.shape[1]:
        return more.clone()
    rows = max(len(before), len(more))
    return torch.cat([before.expand(rows, -1), more.expand(rows, -1)], dim=1)


def _merged(query: Tensor, parts: Iterator[Answer]) -> Answer:
    """Joins answers one after the other in float32; the result in the dtype of the query."""
    out, lse = next(parts)
    for more in parts:
        out, lse = kernels.merge([(out.float(), lse), more])
    return out.to(query.dtype), lse


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, logits: Logits) -> Answer:
    """Attention under a mask [t, m], some rows at a time, so that the logits stay small."""
    rows = max(1, (1 << 24) // (query.shape[0] * query.shape[1] * key.shape[2]))
    parts = [
        reference.attend(
            query[:, :, i : i + rows], key, value, scale=logits.scale, softcap=logits.softcap, mask=mask[i : i + rows]
        )
        for i in range(0, query.shape[2], rows)
    ]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


@dataclass(frozen=True)
class Quantised:
    """Old tokens are packed in ``bits`` per number: keys per channel in groups of ``group`` tokens, values per token in
    groups of ``group`` channels. The last ``residual`` tokens stay as they are."""

    bits: int
    group: int
    residual: int
    needs = Needs(lasting=True)
    offers = StoreOffers()

    def token_bytes(self, heads: int, dim: int, dtype: torch.dtype) -> float:
        sides = (Packing(self.bits, self.group, dim, dtype, are_keys) for are_keys in (True, False))
        return sum(side.page_bytes for side in sides) / PACKED + 4

    def new_segment(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None) -> QuantisedSegment:
        return QuantisedSegment(heads, like, value_dim, rope, bits=self.bits, group=self.group, residual=self.residual)

    def after_layer(self, segments: Sequence[Segment | None], index: int, ahead: int) -> bool:
        return False
