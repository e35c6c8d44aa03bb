"""Uncompressed segments: keys and values as the model made them, and what queries read in them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvote.extra_inputs import ExtraInputs
from kvote.kernels.contract import Choice, Row
from kvote.needs import ANYWHERE, NOTHING, StoreOffers
from kvote.read.reader import Token
from kvote.rope import Angles, Rope
from kvote.store.answers import angles_at, answers, received
from kvote.store.pages import PAGE
from kvote.store.segment import Scaling, Segment
from kvote.store.uncompressed_tokens import UncompressedTokens, token_bytes
from kvote.tokens import Queries, TokenSet

# Query rows per key head up to which a fast kernel adds up attention.
_COUNTED = 64


def _of(tokens: TokenSet, i: int) -> TokenSet:
    """What sequence i reads of them."""
    return tokens if isinstance(tokens.index, range) else replace(tokens, index=tokens.index[i : i + 1])


class UncompressedSegment(UncompressedTokens):
    """All tokens of a layer, unencoded. With a ``rope``, keys arrive and stay at position 0 and are rotated when they
    are read; without, they are kept as the model rotated them."""

    # Whether ``winners`` takes flags that say whom it need not answer.
    skips = True

    def __init__(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None) -> None:
        super().__init__(heads, like, value_dim)
        self.rope = rope
        # The decode step of one sequence in one call, where there is such a kernel, and the lanes of that sequence.
        self._step = self.kernels.step if like.shape[-1] == value_dim else None
        self._only, self._most_heads = tuple(range(heads)), heads * self.kernels.MAX_QUERIES_PER_KV

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
            scale=token.scaling.scale,
            softcap=token.scaling.softcap,
        )
        for lane in pool.lanes:
            lane.length += 1
        return answer

    def observe_queries(
        self, queries: Queries, rows: list[int], prompt_left: int | None, extra_bytes: ExtraInputs | None = None
    ) -> None:
        pass

    def compress(self, prompt_left: int) -> bool:
        return False

    def slotless_attention(self, queries: Queries, rows: list[int], scaling: Scaling) -> tuple[Tensor, Tensor] | None:
        return None

    def attend(self, queries: Queries, rows: list[int], tokens: TokenSet, scaling: Scaling) -> tuple[Tensor, Tensor]:
        heads, t = queries.rotated.shape[1:3]
        query = self.place_queries(queries, tokens)
        if t == tokens.blocks and self._streams(tokens, heads):
            return self._decode_step(query, rows, tokens, scaling)
        return answers(query, *self._place(rows, tokens), tokens, scaling)

    def _streams(self, tokens: TokenSet, heads: int) -> bool:
        """Whether a kernel can read ``tokens`` for single queries straight from the pages."""
        if (1 if tokens.by_head else heads // self.heads) > self.kernels.MAX_QUERIES_PER_KV:
            return False
        placed = self.rope is None or tokens.positions != "original" or (self.alike and not tokens.by_head)
        window = tokens.window is None or tokens.window >= len(tokens)
        return placed and window and len(tokens) > 0 and self._same_shape()

    def _decode_step(self, query: Tensor, rows: list[int], tokens: TokenSet, scaling: Scaling) -> tuple[Tensor, Tensor]:
        """Attention of ``query`` [b, heads, q, d], each reading its own list or all reading the same range."""
        b, heads, _, d = query.shape
        lanes = self._lanes(rows)
        if tokens.by_head:
            # To the kernel, a head with a list of its own is a sequence of one head.
            lanes = tuple(lane for lane in lanes for _ in range(heads // self.heads))
        own = self._own_angles(rows, tokens)
        if own is not None and b > 1:
            # The tokens of each sequence stand at places of their own.
            each = [self._decode_step(query[i : i + 1], [row], _of(tokens, i), scaling) for i, row in enumerate(rows)]
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
                scale=scaling.scale,
                softcap=scaling.softcap,
            )
            outs.append(out.to(query.dtype).view(b, heads, 1, -1))
            lses.append(lse.view(b, heads, 1))
        if len(outs) == 1:
            return outs[0], lses[0]
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

    def attention_mass(
        self, queries: Queries, lse: Tensor, rows: list[int], tokens: TokenSet, scaling: Scaling
    ) -> Tensor:
        heads, t = queries.rotated.shape[1:3]
        if isinstance(tokens.index, range) and self._counts(tokens, heads * t):
            start, m = tokens.index.start, len(tokens)
            limits = [start + (m - t + i + 1 if tokens.causal else m) for i in range(t)]
            chosen = self.table(rows)
            scale, softcap, keys = scaling.scale, scaling.softcap, self.pool.keys
            mass = self.kernels.attention_mass(
                queries.rotated, lse, keys, chosen, start, limits, scale=scale, softcap=softcap
            )
            return mass[:, :, None]
        return received(self.place_queries(queries, tokens), lse, self._place(rows, tokens)[0], tokens, scaling)

    def _counts(self, tokens: TokenSet, query_rows: int) -> bool:
        """Whether a kernel adds up the attention on a range from the pages; for many rows, products of matrices are
        faster."""
        few = query_rows <= _COUNTED * self.heads
        return few and self.rope is None and tokens.window is None and len(tokens) > 0

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

    def place_queries(self, queries: Queries, tokens: TokenSet) -> Tensor:
        """Queries [b, heads, t, d] where they stand for the tokens they read."""
        if self.rope is None or tokens.positions == "original":
            return queries.rotated
        assert queries.unrotated is not None
        b, heads, t, d = queries.unrotated.shape
        q, r = tokens.blocks, t // tokens.blocks
        unrotated = queries.unrotated if q == 1 else queries.unrotated.reshape(b, heads, q, r, d)
        first = len(tokens) - r if tokens.query_at is None else tokens.query_at
        cos, sin = self.rope.contiguous(max(len(tokens), first + 1), queries.unrotated.device, start=first)
        if tokens.query_at is not None:
            cos, sin = cos[:1], sin[:1]
        placed = self.rope.apply(unrotated, (cos, sin))
        return placed if q == 1 else placed.reshape(b, heads, t, d)

    def angles(self, tokens: TokenSet) -> tuple[Tensor, Tensor] | None:
        """Angles [m, r] of the places that the tokens of a set take when they stand side by side, or together."""
        if self.rope is None:
            return None
        n = len(tokens)
        cos, sin = self.rope.contiguous(max(n, (tokens.query_at or 0) + 1), self.pool.keys.device)
        if tokens.positions == "together":
            return cos[:1].repeat(n, 1), sin[:1].repeat(n, 1)
        return (cos, sin) if len(cos) == n else (cos[:n], sin[:n])

    def _own_angles(self, rows: list[int], tokens: TokenSet) -> Angles | None:
        """Angles [b, q, m, r] of where tokens stand in the text, where keys are held without rotation and are wanted
        there, and all key heads hold the same; None otherwise."""
        if self.rope is None or tokens.positions != "original" or tokens.by_head or not self.alike:
            return None
        pool = self.pool.positions
        if isinstance(tokens.index, range):
            places = self._view(pool[..., None], rows, tokens.index.start, tokens.index.stop)[:, :1, :, 0]
        else:
            places = pool.view(-1)[self._slots(rows, tokens.index[:, None], self.heads)[:, 0]]
        return angles_at(self.rope, places)

    def _place(self, rows: list[int], tokens: TokenSet) -> tuple[Tensor, Tensor]:
        """Keys and values [b * q, h, m, c] of a token set, the keys where they stand for the queries; with as many
        heads as the queries where each has its own list."""
        rope = self.rope
        if rope is None:
            return self.read(rows, tokens)[:2]
        own, anew = self._own_angles(rows, tokens), tokens.positions != "original"
        listed = not tokens.by_head and self._same_shape() and (anew or own is not None)
        if isinstance(tokens.index, Tensor) and listed:
            return self._gather(rows, tokens.index, rope, self.angles(tokens) if own is None else own)
        key, value, positions = self.read(rows, tokens)
        if own is not None:
            return rope.apply(key, (own[0].flatten(0, 1)[:, None], own[1].flatten(0, 1)[:, None])), value
        if not anew:
            return rope.apply(key, rope.once(positions.long())), value
        angles = self.angles(tokens)
        assert angles is not None
        return rope.apply(key, angles), value

    def _same_shape(self) -> bool:
        return self.pool.keys.shape == self.pool.values.shape

    def _gather(self, rows: list[int], index: Tensor, rope: Rope, angles: Angles | None) -> tuple[Tensor, Tensor]:
        """The same for listed tokens, fetched and rotated in one go: by ``angles``."""
        b, q, m = index.shape
        key = self.pool.keys.new_empty(b, q, self.heads, m, self.pool.keys.shape[-1])
        value = torch.empty_like(key)
        assert angles is not None
        lanes, out = self.table(rows), (key, value)
        gather, index = self.kernels.gather, index.contiguous()
        gather(self.pool.keys, self.pool.values, lanes, index, angles, rope.interleaved, out)
        return key.flatten(0, 1), value.flatten(0, 1)


@dataclass(frozen=True)
class Uncompressed:
    """Tokens are held as the model made them."""

    needs = NOTHING
    offers = StoreOffers(as_made=True, uneven_heads=True, cuts=ANYWHERE)

    def token_bytes(self, heads: int, dim: int, dtype: torch.dtype) -> float:
        return token_bytes(dim, dim, dtype)

    def new_segment(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None) -> UncompressedSegment:
        from kvote.store.uneven import UnevenSegment

        return UnevenSegment(heads, like, value_dim, rope)

    def after_layer(self, segments: Sequence[Segment | None], index: int, prompt_left: int) -> bool:
        return False
