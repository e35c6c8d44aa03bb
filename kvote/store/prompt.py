"""A prompt that is encoded once, when it has ended, with raw pages behind it for all that comes later."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from kvote import kernels
from kvote.memory import storage_bytes
from kvote.read.tokens import Queries, TokenSet
from kvote.rope import Angles, Rope
from kvote.store.answers import answers, asked_by, received
from kvote.store.raw import RawSegment
from kvote.store.segment import NO_INDEXES, Logits

Slots = range | Tensor


class Body(Protocol):
    """The first tokens of one sequence, encoded. Never changed once made, so copies of a sequence share it.

    ``slots``: a range, or int64 [m] for all key heads, or [h, m]. ``angles`` [m, r]: places of these tokens, where keys
    are held at position 0; None where they are held as the model rotated them.
    """

    @property
    def positions(self) -> Tensor:
        """Original positions, int32 [h, n]."""
        ...

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What it holds and no other layer counts."""
        ...

    def attend(self, query: Tensor, slots: Slots, angles: Angles | None, logits: Logits) -> tuple[Tensor, Tensor]:
        """What queries [heads, t, d], which all see all of ``slots``, read there: [heads, t, dv] and lse [heads, t]."""
        ...

    def read(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """The tokens as full keys [h, m, d] and values [h, m, dv]; with a list for each of several query heads per key
        head, ``slots`` [heads, m], as many heads as lists."""
        ...

    def scores(self, query: Tensor, start: int, stop: int) -> Tensor:
        """q.k of ``query`` [heads, r, d] as the keys are held: [r, heads, n] in float32."""
        ...

    def keep(self, slots: Tensor, content: tuple[Tensor, Tensor] | None = None) -> "Body":
        """What is left of it: ``slots`` [h, m], holding ``content`` [h, m, ...] if given."""
        ...


@dataclass
class Waiting:
    """What is known of a prompt that is not encoded: its last ``queries`` [heads, t, d] each, whether the last pass of
    it has come (``ended``), and how many tokens came ``after`` it."""

    queries: list[Tensor] = field(default_factory=list)
    ended: bool = False
    after: int = 0

    def take(self, query: Tensor, ahead: int | None) -> None:
        """The next ``query`` [heads, t, d] of the sequence; ``ahead`` as in ``Segment.watch``."""
        t = query.shape[1]
        if ahead is None:
            self.after += t
            return
        if self.after:
            # Another turn: what was generated before it is now part of the text that it ends.
            self.queries, self.after = [], 0
        own = t + min(ahead, 0)
        self.queries.append(query[:, :own])
        self.ended, self.after = ahead <= 0, t - own

    def only_last(self, window: int) -> bool:
        """Lets go of all queries but the last ``window``, and says whether there were others."""
        more = sum(query.shape[1] for query in self.queries) > window
        kept: list[Tensor] = []
        for query in reversed(self.queries):
            if window > 0:
                kept.insert(0, query[:, max(0, query.shape[1] - window) :])
                window -= query.shape[1]
        self.queries = [torch.cat(kept, dim=1)] if kept else []
        return more

    def cut(self, gone: int) -> None:
        """The last ``gone`` tokens of the sequence are taken back."""
        later = min(self.after, gone)
        self.after -= later
        gone -= later
        while gone and self.queries:
            last = self.queries.pop()
            if last.shape[1] > gone:
                self.queries.append(last[:, : last.shape[1] - gone])
            gone = max(0, gone - last.shape[1])

    def copy(self) -> "Waiting":
        return Waiting(list(self.queries), self.ended, self.after)


# (the prompt's last queries [heads, w, d], its keys [h, p, d], values and positions [h, p]) -> the encoded first tokens
Encode = Callable[[Tensor, Tensor, Tensor, Tensor], Body | None]


class PromptSegment:
    """A layer's tokens: for each sequence a body, once its prompt has ended, and a tail of raw pages.

    With ``encode``, a prompt is encoded as soon as it ends, by its last ``window`` queries. Without, someone who sees
    more than this layer asks for ``prompt`` and does it with ``put``.
    """

    indexes = NO_INDEXES
    skips = False

    def __init__(
        self, heads: int, like: Tensor, value_dim: int, rope: Rope | None, encode: Encode | None = None, window: int = 0
    ) -> None:
        self.heads, self.rope, self.encode, self.window = heads, rope, encode, window
        self.tail = RawSegment(heads, like, value_dim, rope)
        self.bodies: list[Body | None] = []
        self.waiting: list[Waiting] = []

    @property
    def sequences(self) -> int:
        return len(self.bodies)

    @property
    def device(self) -> torch.device:
        return self.tail.device

    def encoded(self, row: int) -> int:
        """How many first tokens of a sequence are encoded."""
        body = self.bodies[row]
        return 0 if body is None else body.positions.shape[1]

    def length(self, row: int) -> int:
        return self.encoded(row) + self.tail.length(row)

    @property
    def nbytes(self) -> int:
        held = [tensor for body in self.bodies if body is not None for tensor in body.tensors]
        held += [query for waiting in self.waiting for query in waiting.queries]
        return self.tail.nbytes + storage_bytes(held)

    def add_sequences(self, count: int) -> None:
        self.tail.add_sequences(count)
        self.bodies += [None] * count
        self.waiting += [Waiting() for _ in range(count)]

    def reserve(self, tokens: int) -> None:
        self.tail.reserve(tokens)

    def append(self, rows: list[int], key: Tensor, value: Tensor, positions: Tensor) -> None:
        self.tail.append(rows, key, value, positions)

    def watch(self, queries: Queries, rows: list[int], ahead: int | None) -> None:
        for i, row in enumerate(rows):
            if self.bodies[row] is None:
                self.waiting[row].take(queries.rotated[i], ahead)
                if not self.window:
                    self.waiting[row].queries.clear()

    def mark(self) -> tuple[Any, list[Waiting]]:
        return self.tail.mark(), [waiting.copy() for waiting in self.waiting]

    def restore(self, mark: tuple[Any, list[Waiting]]) -> bool:
        tail, self.waiting = mark
        return self.tail.restore(tail)

    def seal(self, ahead: int) -> bool:
        before, forgot = [self.encoded(row) for row in range(self.sequences)], False
        for row, waiting in enumerate(self.waiting):
            if self.bodies[row] is not None:
                continue
            forgot |= waiting.only_last(self.window)
            if self.encode is None or not waiting.queries or self.prompt(row, ahead) is None:
                continue
            waiting.ended = False
            queries = torch.cat(waiting.queries, dim=1)
            held = (*(part[0] for part in self.tail.decode([row], 0, self.length(row))), self._positions(row))
            prompt = [part[:, : self.length(row) - waiting.after] for part in held]
            self.put(row, self.encode(queries, *prompt))
        return forgot or before != [self.encoded(row) for row in range(self.sequences)]

    def prompt(self, row: int, ahead: int) -> int | None:
        """Tokens up to the end of a prompt that is to be encoded now; None if there is no such prompt."""
        waiting = self.waiting[row]
        if ahead or self.bodies[row] is not None or not waiting.ended:
            return None
        return max(0, self.length(row) - waiting.after)

    def put(self, row: int, body: Body | None) -> None:
        """Makes ``body`` stand for the first tokens of a sequence; None: they stay as they are until a prompt ends."""
        self.waiting[row].ended = False
        if body is None:
            return
        self.bodies[row], self.waiting[row] = body, Waiting()
        self.tail.keep(row, torch.arange(body.positions.shape[1], self.tail.length(row)))

    def aside(self, queries: Queries, rows: list[int], logits: Logits) -> None:
        return None

    def attend(self, queries: Queries, rows: list[int], tokens: TokenSet, logits: Logits) -> tuple[Tensor, Tensor]:
        alike = [list(group) for _, group in groupby(range(len(rows)), key=lambda i: self.encoded(rows[i]))]
        if len(alike) == 1:
            return self._alike(queries, rows, tokens, logits)
        parts = []
        for some in alike:
            its, own = asked_by(queries, tokens, some)
            parts.append(self._alike(its, [rows[i] for i in some], own, logits))
        return _joined(parts, dim=0)

    def _alike(self, queries: Queries, rows: list[int], tokens: TokenSet, logits: Logits) -> tuple[Tensor, Tensor]:
        """The answers of sequences of which equally many tokens are encoded."""
        n = self.encoded(rows[0])
        if n == 0:
            return self.tail.attend(queries, rows, tokens, logits)
        query = self.tail.place_queries(queries, tokens)
        if tokens.by_head or (tokens.window is not None and tokens.window < len(tokens)):
            return answers(query, *self._place(rows, tokens), tokens, logits)
        if not isinstance(tokens.index, range) or (self.rope is not None and tokens.positions != "original"):
            return self._lists(query, rows, tokens, logits)
        start, stop = tokens.index.start, tokens.index.stop
        both = []
        if start < n:
            first = range(start, min(stop, n))
            both.append(_stacked([self._first(query[i], row, first, logits) for i, row in enumerate(rows)]))
        if stop > n:
            rest = replace(tokens, index=range(max(start, n) - n, stop - n))
            both.append(self.tail.attend(queries, rows, rest, logits))
        return kernels.merge(both)

    def _first(self, query: Tensor, row: int, slots: range, logits: Logits) -> tuple[Tensor, Tensor]:
        """What ``query`` [heads, t, d] reads in encoded tokens at their own positions."""
        body = self.bodies[row]
        assert body is not None
        return body.attend(query, slots, self._own_angles(body.positions[0, slots.start : slots.stop]), logits)

    def _own_angles(self, positions: Tensor) -> Angles | None:
        """Angles [..., m, r] of tokens at their own ``positions`` [..., m]."""
        # Some ropes look at the largest position, so those of all tokens are asked for at once.
        return None if self.rope is None else self.rope.angles(positions.long(), torch.float32)

    def _lists(self, query: Tensor, rows: list[int], tokens: TokenSet, logits: Logits) -> tuple[Tensor, Tensor]:
        """The answers of ``query`` [b, heads, t, d] to lists, of which each block of queries reads one."""
        each = []
        for i, row in enumerate(rows):
            lists = self._slots(tokens, i)
            blocks = query[i].chunk(len(lists), dim=1)
            parts = [self._list(part, row, slots, tokens, logits) for part, slots in zip(blocks, lists, strict=True)]
            each.append(_joined(parts, dim=1))
        return _stacked(each)

    def _slots(self, tokens: TokenSet, i: int) -> Tensor:
        """The lists [q, m] of the i-th sequence, [q, heads, m] where each query head has its own."""
        if isinstance(tokens.index, range):
            return torch.arange(tokens.index.start, tokens.index.stop, device=self.device)[None]
        return tokens.index[i].transpose(0, 1) if tokens.by_head else tokens.index[i]

    def _list(self, query: Tensor, row: int, slots: Tensor, tokens: TokenSet, logits: Logits) -> tuple[Tensor, Tensor]:
        """What ``query`` [heads, t, d] reads in ``slots`` [m]. Its own tokens, if they are among them, are not encoded,
        so that all of the encoded ones are seen by all rows."""
        body, n = self.bodies[row], self.encoded(row)
        angles = self._angles(row, slots, tokens)
        first = int((slots < n).sum())
        both = []
        if body is not None and first:
            both.append(body.attend(query, slots[:first], _cut(angles, 0, first), logits))
        if first < len(slots):
            key, value, _ = self.tail.read([row], TokenSet((slots[first:] - n)[None, None]))
            turn = _cut(angles, first, len(slots))
            key = key if turn is None or self.rope is None else self.rope.apply(key, turn)
            out, lse = kernels.attend(
                query[None], key, value, scale=logits.scale, softcap=logits.softcap, causal=tokens.causal
            )
            both.append((out[0], lse[0]))
        return kernels.merge(both)

    def _angles(self, row: int, slots: Tensor, tokens: TokenSet) -> Angles | None:
        """Angles of the places at which one list of ``tokens`` is read: [m, r], [heads, m, r] for lists by head."""
        if tokens.positions != "original":
            return self.tail.angles(tokens)
        return None if self.rope is None else self._own_angles(self._positions(row)[0, slots])

    def _place(self, rows: list[int], tokens: TokenSet) -> tuple[Tensor, Tensor]:
        """Keys and values [b * q, h, m, c] of a token set, the keys where they stand for the queries; with as many
        heads as the queries where each has its own list."""
        keys, values = [], []
        for i, row in enumerate(rows):
            for slots in self._slots(tokens, i):
                key, value = self._gather(row, slots)
                angles = self._angles(row, slots, tokens)
                keys.append(key if angles is None or self.rope is None else self.rope.apply(key, angles))
                values.append(value)
        return torch.stack(keys), torch.stack(values)

    def _gather(self, row: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Full keys [h, m, d] and values [h, m, dv], as they are held, of ``slots`` [m], [h, m], or [heads, m]: one
        list for each of several query heads per key head, which makes h as many heads."""
        body, n = self.bodies[row], self.encoded(row)
        if body is None or n == 0:
            first = [part[:, :0] for part in self._tail_tokens(row)]
        else:
            first = list(body.read(slots.clamp(max=n - 1)))
        slots = slots if slots.dim() == 2 else slots.expand(self.heads, -1)
        head, at = head_of(slots, self.heads), (slots - n).clamp(min=0)
        both = []
        for encoded, raw in zip(first, self._tail_tokens(row), strict=True):
            later = raw[head, at] if raw.shape[1] else encoded
            both.append(torch.where((slots < n)[..., None], encoded, later) if n else later)
        return both[0], both[1]

    def _tail_tokens(self, row: int) -> tuple[Tensor, Tensor]:
        key, value = self.tail.decode([row], 0, self.tail.length(row))
        return key[0], value[0]

    def attention_mass(
        self, queries: Queries, lse: Tensor, rows: list[int], tokens: TokenSet, logits: Logits
    ) -> Tensor:
        if not any(self.encoded(row) for row in rows):
            return self.tail.attention_mass(queries, lse, rows, tokens, logits)
        return received(self.tail.place_queries(queries, tokens), lse, self._place(rows, tokens)[0], tokens, logits)

    def scores(self, query: Tensor, rows: list[int], start: int, stop: int) -> Tensor:
        return torch.stack([self._scores(query[i], row, start, stop) for i, row in enumerate(rows)])

    def _scores(self, query: Tensor, row: int, start: int, stop: int) -> Tensor:
        body, n = self.bodies[row], self.encoded(row)
        both = []
        if body is not None and start < n:
            both.append(body.scores(query, start, min(stop, n)))
        if stop > n:
            both.append(self.tail.scores(query[None], [row], max(start, n) - n, stop - n)[0])
        return torch.cat(both, dim=-1)

    def votes(self, query: Tensor, rows: list[int], start: int, limits: list[int]) -> Tensor:
        if not any(self.encoded(row) for row in rows):
            return self.tail.votes(query, rows, start, limits)
        return kernels.votes_within(self.scores(query, rows, start, max(limits)), start, limits)

    def winners(self, query: Tensor, rows: list[int], start: int, limits: list[int], k: int) -> Tensor:
        if not any(self.encoded(row) for row in rows):
            return self.tail.winners(query, rows, start, limits, k)
        return kernels.winners_within(self.votes(query, rows, start, limits), start, limits, k)

    def decode(self, rows: list[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        each = [self._gather(row, torch.arange(start, stop, device=self.device)) for row in rows]
        return torch.stack([key for key, _ in each]), torch.stack([value for _, value in each])

    def positions(self, row: int) -> list[Tensor]:
        return list(self._positions(row))

    def _positions(self, row: int) -> Tensor:
        """Original positions [h, n] of the tokens held."""
        body, later = self.bodies[row], torch.stack(self.tail.positions(row))
        return later if body is None else torch.cat([body.positions, later], dim=1)

    def keep(self, row: int, slots: Tensor, content: tuple[Tensor, Tensor] | None = None) -> None:
        body, n = self.bodies[row], self.encoded(row)
        if body is None:
            self.tail.keep(row, slots, content)
            return
        slots = slots.to(self.device).expand(self.heads, -1)
        counts = (slots < n).sum(dim=1)
        # All key heads have equally many encoded tokens; what some have besides moves over, as full keys.
        first = int(counts.min())
        rest = slots[:, first:]
        if bool((counts > first).any()):
            key, value = self._gather(row, rest) if content is None else (part[:, first:] for part in content)
            positions = self._positions(row).gather(1, rest)
            self.tail.truncate(row, 0)
            self.tail.put([row], key[None], value[None], positions[None])
            self.tail.trim()
        else:
            self.tail.keep(row, rest - n, None if content is None else (content[0][:, first:], content[1][:, first:]))
        new = None if content is None else (content[0][:, :first], content[1][:, :first])
        self.bodies[row] = body.keep(slots[:, :first], new) if first else None

    def truncate(self, row: int, length: int) -> None:
        body, n = self.bodies[row], self.encoded(row)
        self.waiting[row].cut(self.length(row) - length)
        self.tail.truncate(row, max(0, length - n))
        if body is not None and length < n:
            kept = torch.arange(length, device=self.device).expand(self.heads, -1)
            self.bodies[row] = body.keep(kept) if length else None

    def select(self, index: list[int]) -> None:
        self.tail.select(index)
        self.bodies = [self.bodies[i] for i in index]
        self.waiting = [self.waiting[i].copy() for i in index]

    def trim(self) -> None:
        self.tail.trim()

    def tokens_within(self, nbytes: float, beside: int = 0) -> int:
        return self.tail.tokens_within(nbytes, beside)


def head_of(slots: Tensor, heads: int) -> Tensor:
    """The key heads [lists, 1], of ``heads``, that ``slots`` [lists, m] of key heads or of query heads are of."""
    return torch.arange(heads, device=slots.device).repeat_interleave(len(slots) // heads)[:, None]


def _cut(angles: Angles | None, start: int, stop: int) -> Angles | None:
    return None if angles is None else (angles[0][start:stop], angles[1][start:stop])


def _joined(parts: list[tuple[Tensor, Tensor]], dim: int) -> tuple[Tensor, Tensor]:
    return torch.cat([out for out, _ in parts], dim=dim), torch.cat([lse for _, lse in parts], dim=dim)


def _stacked(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])
