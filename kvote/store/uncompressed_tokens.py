"""Uncompressed tokens as pages hold them: how they come, move and go, and where they lie."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvote import kernels
from kvote.index.column import Column, Index
from kvote.store.pages import PAGE, Lane, UncompressedPool
from kvote.tokens import TokenSet

_QUESTION = 8 * PAGE
# Tokens for which a lane may have room that it does not use yet.
ROOM = _QUESTION + 2 * PAGE


class UncompressedTokens:
    """Keys and values in the model's dtype, one lane per sequence and key head; ``indexes``: columns derived from the
    keys, by name."""

    def __init__(self, heads: int, like: Tensor, value_dim: int) -> None:
        self.heads = heads
        # Whether all key heads of a sequence hold the same tokens.
        self.alike = True
        # What reads this segment; asked once, because a decode step is short.
        self.kernels = kernels.chosen(like)
        self.pool = UncompressedPool(like.shape[-1], value_dim, like.dtype, like.device)
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

    def held(self, rows: list[int], each: int = 0) -> tuple[Tensor, Tensor, kernels.Lanes]:
        """As kernels read them; with ``each``, every lane so many times."""
        lanes = self._lanes(rows)
        lanes = tuple(lane for lane in lanes for _ in range(each)) if each else lanes
        return self.pool.keys, self.pool.values, self.pool.table(lanes)

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

    def truncate(self, row: int, length: int) -> None:
        """Forgets the last tokens of a sequence, down to ``length``."""
        for i in self._lanes([row]):
            self.pool.truncate(self.pool.lanes[i], length)

    def checkpoint(self) -> list[int]:
        return [lane.length for lane in self.pool.lanes]

    def restore(self, checkpoint: list[int]) -> bool:
        for lane, length in zip(self.pool.lanes, checkpoint, strict=True):
            self.pool.truncate(lane, length)
        return not self.pool.moving

    def select(self, index: list[int]) -> None:
        """Makes sequence i a copy of the former sequence ``index[i]``; pages are shared until one of them writes."""
        self.pool.select(self._lanes(index))

    def trim(self) -> None:
        self.pool.trim()

    def tokens_within(self, nbytes: float, extra_bytes: int = 0) -> int:
        return self.pool.tokens_within(nbytes, extra_bytes)

    def positions(self, row: int) -> list[Tensor]:
        """Original positions of the tokens held, one int32 tensor per key/value head."""
        lanes = [self.pool.lanes[i] for i in self._lanes([row])]
        return [self.pool.positions.view(-1)[self.pool.slots(lane, 0, lane.length)] for lane in lanes]

    def decode(self, rows: list[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self._view(self.pool.keys, rows, start, stop), self._view(self.pool.values, rows, start, stop)

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


def token_bytes(dim: int, value_dim: int, dtype: torch.dtype) -> int:
    """Bytes of an uncompressed token of one key head: key, value and position."""
    return (dim + value_dim) * dtype.itemsize + 4
