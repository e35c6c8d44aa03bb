"""Raw pages: keys and values as the model made them, in the model's dtype."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvote import kernels
from kvote.index.column import Column, Index
from kvote.kernels.contract import Choice, Row
from kvote.read.tokens import Queries, Token, TokenSet
from kvote.rope import Angles, Rope
from kvote.store.answers import angles_at, answers, received
from kvote.store.pages import PAGE, Lane, RawPool
from kvote.store.segment import Logits, Segment

_QUESTION = 8 * PAGE
# Tokens for which a lane may have room that it does not use yet.
ROOM = _QUESTION + 2 * PAGE
# Query rows per key head up to which a fast kernel adds up attention.
_COUNTED = 64


def _of(tokens: TokenSet, i: int) -> TokenSet:
    """What sequence i reads of them."""
    return tokens if isinstance(tokens.index, range) else replace(tokens, index=tokens.index[i : i + 1])


class RawSegment:
    """All tokens of a layer, unencoded, one lane per sequence and key/value head.

    With a ``rope``, keys arrive and stay at position 0 and are rotated when they are read; without, they are kept as
    the model rotated them. ``indexes``: columns derived from the keys, by name.
    """

    def __init__(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None) -> None:
        self.heads, self.rope = heads, rope
        # Whether all key heads of a sequence hold the same tokens.
        self.alike = True
        # What reads this segment; asked once, because a decode step is short.
        self.kernels = kernels.chosen(like)
        # The decode step of one sequence in one call, where there is such a kernel, and the lanes of that sequence.
        self._step = self.kernels.step if like.shape[-1] == value_dim else None
        self._only, self._most_heads = tuple(range(heads)), heads * self.kernels.MAX_GROUPS
        self.pool = RawPool(like.shape[-1], value_dim, like.dtype, like.device)
        self.indexes: dict[str, Column] = {}
        # Of these, the one that the kernel that stores tokens writes on the way, and all others.
        self._coded: Column | None = None
        self._written: list[Column] = []

    # Whether ``winners`` takes flags that say whom it need not answer.
    skips = True

    def add_index(self, index: Index, layer: int) -> None:
        """Keeps what ``index`` derives from the keys of layer ``layer``, of the tokens held and of those to come."""
        column = index.column(self, layer)
        if column is None:
            return
        self.indexes[index.name] = column
        if column.coded is not None and self._coded is None:
            self._coded = column
        else:
            self._written.append(column)
        # The longest last: copies may share pages, and what is written for a page is to cover all of its tokens.
        for row in sorted(range(self.sequences), key=self.length):
            if n := self.length(row):
                lanes = [self.pool.lanes[i] for i in self._lanes([row])]
                column.write(lanes, 0, self._view(self.pool.keys, [row], 0, n))

    @property
    def sequences(self) -> int:
        return len(self.pool.lanes) // self.heads

    @property
    def device(self) -> torch.device:
        return self.pool.keys.device

    def length(self, row: int) -> int:
        return self.pool.lanes[row * self.heads].length

    @property
    def nbytes(self) -> int:
        return self.pool.nbytes + sum(column.nbytes for column in self.indexes.values())

    def _lanes(self, rows: Sequence[int]) -> tuple[int, ...]:
        if len(rows) == 1:
            return tuple(range(rows[0] * self.heads, (rows[0] + 1) * self.heads))
        return tuple(row * self.heads + head for row in rows for head in range(self.heads))

    @property
    def _codes(self) -> tuple[Tensor | None, int]:
        """What the kernel that stores tokens writes on the way, and its bits per channel."""
        return (None, 0) if self._coded is None else self._coded.coded or (None, 0)

    def table(self, rows: Sequence[int]) -> kernels.Lanes:
        """Where sequences lie, as kernels read it; a lane per sequence and key head."""
        return self.pool.table(self._lanes(rows))

    def add_sequences(self, count: int) -> None:
        """Adds ``count`` sequences without tokens."""
        self.pool.lanes += [Lane() for _ in range(count * self.heads)]

    def reserve(self, tokens: int) -> None:
        """Makes room for ``tokens`` more tokens in every lane, and a question and its answer, in one piece."""
        self.pool.grow([lane.length + tokens + _QUESTION for lane in self.pool.lanes], room=False)

    def append(self, rows: list[int], key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Adds tokens: ``key`` [b, h, t, d], ``value`` [b, h, t, dv], original ``positions`` [b, t]."""
        pool, t, chosen = self.pool, key.shape[2], self._lanes(rows)
        if not pool.has_room(chosen, t):
            targets = [lane.length for lane in pool.lanes]
            for i in chosen:
                targets[i] += t
            pool.grow(targets)
        pools = (pool.keys, pool.values, pool.positions)
        key, value = key.to(pool.keys.dtype), value.to(pool.values.dtype)
        positions = positions.to(torch.int64)
        key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
        lengths = [pool.lanes[i].length for i in chosen]
        table = pool.table(chosen)
        codes, bits = self._codes
        self.kernels.append(key, value, positions, pools, table, lengths, codes, bits)
        if self._written:
            self._derive(self._written, [pool.lanes[i] for i in chosen], key)
        for i in chosen:
            pool.lanes[i].length += t

    def _derive(self, columns: Iterable[Column], lanes: list[Lane], key: Tensor) -> None:
        """Has columns cover the next tokens of ``lanes``, whose keys ``key`` [b, h, t, d] lie in the pool already."""
        starts = [lane.length for lane in lanes[:: self.heads]]
        for column in columns:
            if len(set(starts)) == 1:
                column.write(lanes, starts[0], key)
                continue
            for i, start in enumerate(starts):
                column.write(lanes[i * self.heads : (i + 1) * self.heads], start, key[i : i + 1])

    def step(self, token: Token, back: Row | None, choice: Choice | None) -> tuple[Tensor, bool] | None:
        """Adds the next token of the only sequence, and answers its query [1, 1, heads, dv] from what is held, as
        ``append`` and ``attend`` do at contiguous positions; says whether ``choice.kept`` was read. None, and nothing
        has changed, where that is not one call of a kernel.

        ``back``: the angles that undo the model's rotation, where keys are held at position 0.
        """
        step = self._step
        if step is None or not self.alike or self._written or (self.rope is None) != (back is None):
            return None
        pool, lanes = self.pool, self._only
        query, key, value = token.query, token.key, token.value
        length = pool.lanes[0].length
        if not query.dtype == key.dtype == value.dtype == pool.keys.dtype or query.shape[1] > self._most_heads:
            return None
        # Without sharing, a page that has been begun has room and one owner.
        if (pool.shares or length % PAGE == 0) and not pool.has_room(lanes, 1):
            pool.grow([length + 1] * self.heads)
        reach = length + 1
        if choice is not None:
            reach = max(reach - choice.edge + choice.sinks + choice.top_k, choice.asked_at + 1)
        answer: tuple[Tensor, bool] = step(
            query,
            key,
            value,
            token.position,
            length,
            (pool.keys, pool.values, pool.positions),
            pool.table(lanes),
            *self._codes,
            back=back,
            angles=None if self.rope is None else self.rope.table(reach, key.device),
            interleaved=self.rope is not None and self.rope.interleaved,
            choice=choice,
            scale=token.logits.scale,
            softcap=token.logits.softcap,
        )
        for lane in pool.lanes:
            lane.length += 1
        return answer

    def watch(self, queries: Queries, rows: list[int], ahead: int | None) -> None:
        pass

    def mark(self) -> list[int]:
        return [lane.length for lane in self.pool.lanes]

    def restore(self, mark: list[int]) -> bool:
        for lane, length in zip(self.pool.lanes, mark, strict=True):
            self.pool.truncate(lane, length)
        return not self.pool.moving

    def seal(self, ahead: int) -> bool:
        return False

    def aside(self, queries: Queries, rows: list[int], logits: Logits) -> tuple[Tensor, Tensor] | None:
        return None

    def attend(self, queries: Queries, rows: list[int], tokens: TokenSet, logits: Logits) -> tuple[Tensor, Tensor]:
        heads, t = queries.rotated.shape[1:3]
        query = self.place_queries(queries, tokens)
        if t == tokens.blocks and self._streams(tokens, heads):
            return self._decode_step(query, rows, tokens, logits)
        return answers(query, *self._place(rows, tokens), tokens, logits)

    def place_queries(self, queries: Queries, tokens: TokenSet) -> Tensor:
        """Queries [b, heads, t, d] where they stand for the tokens they read."""
        if self.rope is None or tokens.positions == "original":
            return queries.rotated
        assert queries.raw is not None
        b, heads, t, d = queries.raw.shape
        q, r = tokens.blocks, t // tokens.blocks
        raw = queries.raw if q == 1 else queries.raw.reshape(b, heads, q, r, d)
        first = len(tokens) - r if tokens.query_at is None else tokens.query_at
        cos, sin = self.rope.contiguous(max(len(tokens), first + 1), queries.raw.device, start=first)
        if tokens.query_at is not None:
            cos, sin = cos[:1], sin[:1]
        placed = self.rope.apply(raw, (cos, sin))
        return placed if q == 1 else placed.reshape(b, heads, t, d)

    def _streams(self, tokens: TokenSet, heads: int) -> bool:
        """Whether a kernel can read ``tokens`` for single queries straight from the pages."""
        if (1 if tokens.by_head else heads // self.heads) > self.kernels.MAX_GROUPS:
            return False
        placed = self.rope is None or tokens.positions == "contiguous" or (self.alike and not tokens.by_head)
        window = tokens.window is None or tokens.window >= len(tokens)
        return placed and window and len(tokens) > 0 and self._same_shape()

    def _decode_step(self, query: Tensor, rows: list[int], tokens: TokenSet, logits: Logits) -> tuple[Tensor, Tensor]:
        """Attention of ``query`` [b, heads, q, d], each reading its own list or all reading the same range."""
        b, heads, _, d = query.shape
        lanes = self._lanes(rows)
        if tokens.by_head:
            # To the kernel, a head with a list of its own is a sequence of one head.
            lanes = tuple(lane for lane in lanes for _ in range(heads // self.heads))
        own = self._own_angles(rows, tokens)
        if own is not None and b > 1:
            # The tokens of each sequence stand at places of their own.
            each = [self._decode_step(query[i : i + 1], [row], _of(tokens, i), logits) for i, row in enumerate(rows)]
            return torch.cat([out for out, _ in each]), torch.cat([lse for _, lse in each])
        outs, lses = [], []
        for j in range(query.shape[2]):
            out, lse = self.kernels.decode(
                query[:, :, j].reshape(-1, 1, d) if tokens.by_head else query[:, :, j],
                self.pool.keys,
                self.pool.values,
                self.pool.table(lanes),
                tokens.index
                if isinstance(tokens.index, range)
                else tokens.index[..., j, :].reshape(-1, len(tokens)).contiguous(),
                angles=self.angles(tokens) if own is None else (own[0][0, j], own[1][0, j]),
                interleaved=self.rope is not None and self.rope.interleaved,
                scale=logits.scale,
                softcap=logits.softcap,
            )
            outs.append(out.to(query.dtype).view(b, heads, 1, -1))
            lses.append(lse.view(b, heads, 1))
        if len(outs) == 1:
            return outs[0], lses[0]
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

    def attention_mass(
        self, queries: Queries, lse: Tensor, rows: list[int], tokens: TokenSet, logits: Logits
    ) -> Tensor:
        heads, t = queries.rotated.shape[1:3]
        if isinstance(tokens.index, range) and self._counts(tokens, heads * t):
            start, m = tokens.index.start, len(tokens)
            limits = [start + (m - t + i + 1 if tokens.causal else m) for i in range(t)]
            chosen = self.table(rows)
            scale, softcap, keys = logits.scale, logits.softcap, self.pool.keys
            mass = self.kernels.attention_mass(
                queries.rotated, lse, keys, chosen, start, limits, scale=scale, softcap=softcap
            )
            return mass[:, :, None]
        return received(self.place_queries(queries, tokens), lse, self._place(rows, tokens)[0], tokens, logits)

    def _counts(self, tokens: TokenSet, query_rows: int) -> bool:
        """Whether a kernel adds up the attention on a range from the pages; for many rows, products of matrices are
        faster."""
        few = query_rows <= _COUNTED * self.heads
        return few and self.rope is None and tokens.window is None and len(tokens) > 0

    def angles(self, tokens: TokenSet) -> tuple[Tensor, Tensor] | None:
        """Angles [m, r] of the places that the tokens of a set take when they stand side by side."""
        if self.rope is None:
            return None
        n = len(tokens)
        cos, sin = self.rope.contiguous(max(n, (tokens.query_at or 0) + 1), self.pool.keys.device)
        return (cos, sin) if len(cos) == n else (cos[:n], sin[:n])

    def _own_angles(self, rows: list[int], tokens: TokenSet) -> Angles | None:
        """Angles [b, q, m, r] of where tokens stand in the text, where keys are held without rotation and are wanted
        there, and all key heads hold the same; None otherwise."""
        if self.rope is None or tokens.positions == "contiguous" or tokens.by_head or not self.alike:
            return None
        pool = self.pool.positions
        if isinstance(tokens.index, range):
            places = self._view(pool[..., None], rows, tokens.index.start, tokens.index.stop)[:, :1, :, 0]
        else:
            places = pool.view(-1)[self._slots(rows, tokens.index[:, None], self.heads)[:, 0]]
        return angles_at(self.rope, places)

    def scores(self, query: Tensor, rows: list[int], start: int, stop: int) -> Tensor:
        return self.kernels.scores(query, self.pool.keys, self.table(rows), start, stop)

    def votes(self, query: Tensor, rows: list[int], start: int, limits: list[int]) -> Tensor:
        """Soft votes [b, r, n] on tokens ``start`` to ``limits[-1]``; query j votes on those before ``limits[j]``."""
        return self.kernels.votes(query, self.pool.keys, self.table(rows), None, 0, start, limits)

    def winners(
        self, query: Tensor, rows: list[int], start: int, limits: list[int], k: int, skip: Tensor | None = None
    ) -> Tensor:
        """The ``k`` tokens [b, r, k] with the most votes, ascending; arguments as ``votes``. ``skip`` bool [b]: whose
        answers nobody will look at."""
        return self.kernels.select(query, self.pool.keys, self.table(rows), None, 0, start, limits, k, 0, skip)

    def held(self, rows: list[int]) -> tuple[Tensor, Tensor, kernels.Lanes]:
        """As kernels read them."""
        return self.pool.keys, self.pool.values, self.table(rows)

    def decode(self, rows: list[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self._view(self.pool.keys, rows, start, stop), self._view(self.pool.values, rows, start, stop)

    def positions(self, row: int) -> list[Tensor]:
        """Original positions of the tokens held, one int32 tensor per key/value head."""
        lanes = [self.pool.lanes[i] for i in self._lanes([row])]
        return [self.pool.positions.view(-1)[self.pool.slots(lane, 0, lane.length)] for lane in lanes]

    def keep(self, row: int, slots: Tensor, content: tuple[Tensor, Tensor] | None = None) -> None:
        pool, lanes = self.pool, [self.pool.lanes[i] for i in self._lanes([row])]
        self.alike &= slots.dim() == 1 or len(slots) == 1
        slots = slots.to(pool.keys.device).expand(self.heads, -1)
        count = slots.shape[1]
        # Up to the first token that moves in any lane, pages stay as they are and stay shared.
        moving = (slots != torch.arange(count, device=slots.device)).any(dim=0)
        moved = int(moving.int().argmax()) if bool(moving.any()) else count
        moved = 0 if content is not None else moved
        old = torch.stack([pool.slots(lane, 0, lane.length) for lane in lanes]).gather(1, slots[:, moved:]).flatten()
        parts = (pool.keys, pool.values, pool.positions)
        held = [part.view(PAGE * part.shape[0], -1).index_select(0, old) for part in parts]
        if content is not None:
            held[:2] = [new.to(part.dtype).flatten(0, 1) for new, part in zip(content, parts, strict=False)]
        for lane in lanes:
            pool.truncate(lane, moved)
        if len(old):
            self._rewrite(lanes, held, count - moved)
        pool.trim()

    def put(self, rows: list[int], key: Tensor, value: Tensor, positions: Tensor) -> None:
        """As ``append``, with ``positions`` [b, h, t] that may differ by head."""
        self.alike = False
        lanes = [self.pool.lanes[i] for i in self._lanes(rows)]
        pools = (self.pool.keys, self.pool.values, self.pool.positions)
        parts = (key.flatten(0, 2), value.flatten(0, 2), positions.reshape(-1, 1))
        held = [part.to(old.dtype) for part, old in zip(parts, pools, strict=True)]
        self._rewrite(lanes, held, key.shape[2])

    def _rewrite(self, lanes: list[Lane], held: list[Tensor], t: int) -> None:
        """Adds ``t`` tokens to each lane: keys, values and positions [lanes * t, ...] in that order."""
        pool, chosen = self.pool, {id(lane) for lane in lanes}
        pool.grow([lane.length + t * (id(lane) in chosen) for lane in pool.lanes])
        for part, new in zip((pool.keys, pool.values, pool.positions), held, strict=True):
            flat = part.view(PAGE * part.shape[0], -1)
            for lane, own in zip(lanes, torch.split(new, t), strict=True):
                if len(lane.runs) == 1:
                    first = lane.runs[0][0] * PAGE + lane.length
                    flat[first : first + t] = own
                else:
                    flat.index_copy_(0, pool.slots(lane, lane.length, lane.length + t), own)
        self._derive(self.indexes.values(), lanes, held[0].reshape(-1, self.heads, t, held[0].shape[-1]))
        for lane in lanes:
            lane.length += t

    def tokens_within(self, nbytes: float, beside: int = 0) -> int:
        return self.pool.tokens_within(nbytes, beside)

    def truncate(self, row: int, length: int) -> None:
        """Forgets the last tokens of a sequence, down to ``length``."""
        for i in self._lanes([row]):
            self.pool.truncate(self.pool.lanes[i], length)

    def select(self, index: list[int]) -> None:
        """Makes sequence i a copy of the former sequence ``index[i]``; pages are shared until one of them writes."""
        self.pool.select(self._lanes(index))

    def trim(self) -> None:
        self.pool.trim()

    def _bases(self, rows: list[int]) -> list[int] | None:
        """First slot of each lane, if each lies in one run."""
        lanes = [self.pool.lanes[i] for i in self._lanes(rows)]
        return [lane.runs[0][0] * PAGE for lane in lanes] if all(len(lane.runs) == 1 for lane in lanes) else None

    def pages(self, rows: Sequence[int]) -> Tensor:
        """Page table of equally long lanes, int64 [b * h, pages]."""
        pages = -(-self.length(rows[0]) // PAGE)
        tables = [torch.from_numpy(self.pool.lanes[i].page_ids()[:pages]) for i in self._lanes(rows)]
        return torch.stack(tables).to(self.pool.keys.device)

    def _view(self, pool: Tensor, rows: list[int], start: int, stop: int) -> Tensor:
        """Tokens ``start`` to ``stop`` as [b, h, n, c]: a view where lanes lie evenly spaced, a copy otherwise."""
        b, h, n, c = len(rows), self.heads, stop - start, pool.shape[-1]
        bases = self._bases(rows)
        if bases is not None:
            step = bases[1] - bases[0] if len(bases) > 1 else 0
            if step >= 0 and all(base == bases[0] + i * step for i, base in enumerate(bases)):
                return pool.as_strided((b, h, n, c), (h * step * c, step * c, c, 1), (bases[0] + start) * c)
        pages = self.pages(rows)[:, start // PAGE : -(-stop // PAGE)]
        tokens = pool[pages].reshape(b, h, -1, c)
        return tokens[:, :, start % PAGE : start % PAGE + n]

    def _place(self, rows: list[int], tokens: TokenSet) -> tuple[Tensor, Tensor]:
        """Keys and values [b * q, h, m, c] of a token set, the keys where they stand for the queries; with as many
        heads as the queries where each has its own list."""
        rope = self.rope
        if rope is None:
            return self.read(rows, tokens)[:2]
        own, contiguous = self._own_angles(rows, tokens), tokens.positions == "contiguous"
        listed = not tokens.by_head and self._same_shape() and (contiguous or own is not None)
        if isinstance(tokens.index, Tensor) and listed:
            return self._gather(rows, tokens.index, rope, own)
        key, value, positions = self.read(rows, tokens)
        if own is not None:
            return rope.apply(key, (own[0].flatten(0, 1)[:, None], own[1].flatten(0, 1)[:, None])), value
        if not contiguous:
            return rope.apply(key, rope.once(positions.long())), value
        angles = self.angles(tokens)
        assert angles is not None
        return rope.apply(key, angles), value

    def _same_shape(self) -> bool:
        return self.pool.keys.shape == self.pool.values.shape

    def _gather(self, rows: list[int], index: Tensor, rope: Rope, own: Angles | None) -> tuple[Tensor, Tensor]:
        """The same for listed tokens, fetched and rotated in one go: by ``own`` angles, or at contiguous positions."""
        b, q, m = index.shape
        key = self.pool.keys.new_empty(b, q, self.heads, m, self.pool.keys.shape[-1])
        value = torch.empty_like(key)
        angles = rope.contiguous(m, key.device) if own is None else own
        lanes, out = self.table(rows), (key, value)
        gather, index = self.kernels.gather, index.contiguous()
        gather(self.pool.keys, self.pool.values, lanes, index, angles, rope.interleaved, out)
        return key.flatten(0, 1), value.flatten(0, 1)

    def read(self, rows: list[int], tokens: TokenSet) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [b * q, h, m, c] and positions [b * q, h, m] of a token set; h lists or one for all."""
        pools = (self.pool.keys, self.pool.values, self.pool.positions[..., None])
        if isinstance(tokens.index, range):
            key, value, at = (self._view(p, rows, tokens.index.start, tokens.index.stop) for p in pools)
            return key, value, at[..., 0]
        index = tokens.index if tokens.by_head else tokens.index[:, None]
        # As many heads as there are lists of their own, or else key heads that share one.
        b, heads, q, m = len(rows), max(index.shape[1], self.heads), tokens.blocks, len(tokens)
        slots = self._slots(rows, index, heads).transpose(1, 2).reshape(-1)
        key, value, at = (p.reshape(-1, p.shape[-1]).index_select(0, slots) for p in pools)
        shape = (b * q, heads, m)
        return key.reshape(*shape, -1), value.reshape(*shape, -1), at.reshape(shape)

    def _slots(self, rows: list[int], index: Tensor, heads: int) -> Tensor:
        """Where in the pool the tokens ``index`` [b, lists, q, m] lie, for ``heads`` heads: [b, heads, q, m]."""
        flat = index.flatten(2).expand(-1, heads, -1)
        bases = self._bases(rows)
        if bases is not None:
            each = torch.tensor(bases, device=flat.device).reshape(len(rows), self.heads, 1)
            slots = flat + each.repeat_interleave(heads // self.heads, dim=1)
        else:
            pages = self.pages(rows).reshape(len(rows), self.heads, -1).repeat_interleave(heads // self.heads, dim=1)
            slots = pages.gather(2, flat // PAGE) * PAGE + flat % PAGE
        return slots.view(len(rows), heads, *index.shape[2:])


def token_bytes(dim: int, value_dim: int, dtype: torch.dtype) -> int:
    """Bytes of a raw token of one key head: key, value and position."""
    return (dim + value_dim) * dtype.itemsize + 4


@dataclass(frozen=True)
class Raw:
    """Tokens are held as the model made them."""

    needs_raw_keys: bool = False
    lists: bool = True
    regroups: bool = False
    needs_plain_keys: bool = False
    indexed: bool = True
    spans_layers: bool = False
    retains: bool = False

    def token_bytes(self, heads: int, dim: int, dtype: torch.dtype) -> float:
        return token_bytes(dim, dim, dtype)

    # Whether key heads may hold different numbers of tokens.
    uneven: bool = True

    def new_segment(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None) -> RawSegment:
        from kvote.store.uneven import UnevenSegment

        return UnevenSegment(heads, like, value_dim, rope)

    def after_layer(self, segments: Sequence[Segment | None], index: int, ahead: int) -> bool:
        return False
