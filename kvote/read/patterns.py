"""Patterns of attention in prompts, and what the last queries of a pass say about them."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kvote import kernels
from kvote.read.reader import Reading

# By name of a pattern, its sizes.
SIZES = {"a_shape": ("sinks", "local"), "vertical_slash": ("vertical", "slash"), "block_sparse": ("blocks",)}
# Float32 logits of the last queries that exist at a time (64 MiB).
_LOGITS_HELD = 1 << 24
_CHOSEN = float("inf")


class Pattern(NamedTuple):
    """``kind``: a name in ``SIZES``, and the ``sizes`` that belong to it."""

    kind: str
    sizes: tuple[int, ...]

    def covers(self, n: int, block: int) -> bool:
        """Whether it leaves out nothing of ``n`` tokens."""
        if self.kind == "vertical_slash":
            return max(self.sizes) >= n
        return sum(self.sizes) >= n if self.kind == "a_shape" else self.sizes[0] * block >= n


@dataclass
class Estimate:
    """Scores of the tokens held for the first ``count`` query rows of a reading, by the ``last`` of these; ``first``
    columns and ``nearest`` diagonals are taken whatever they score. Blocks of ``block`` rows read alike."""

    reading: Reading
    count: int
    last: int
    first: int
    nearest: int
    block: int

    @property
    def n(self) -> int:
        return self.reading.first + self.count

    @cached_property
    def key(self) -> Tensor:
        """Keys [b, h, n, d] as the model rotated them."""
        segment, rows, rope = self.reading.segment, self.reading.rows, self.reading.rope
        key = segment.decode(rows, 0, self.n)[0]
        if rope is None:
            return key
        places = torch.stack([torch.stack(segment.positions(row))[:, : self.n] for row in rows])
        return rope.apply(key, rope.once(places.long()))

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor]:
        """Softmax weights of the last queries, summed over columns and over diagonals, each [b, heads, n]: of token j,
        and of the token o before each query."""
        query, n = self.reading.queries.rotated[:, :, : self.count], self.n
        b, heads, t, _ = query.shape
        columns, diagonals = torch.zeros(2, b, heads, n, device=query.device)
        tokens, size = torch.arange(n, device=query.device), max(1, _LOGITS_HELD // (b * heads * n))
        for start in range(max(0, t - self.last), t, size):
            rows = query[:, :, start : start + size]
            slots = torch.arange(start, start + rows.shape[2], device=query.device) + self.reading.first
            if self.reading.rope is None:
                products = self.reading.segment.scores(rows, self.reading.rows, 0, n)
            else:
                products = kernels.scores(rows, self.key)
            late = tokens > slots[:, None, None]
            weights = self.reading.scaled(products).masked_fill(late, float("-inf")).softmax(-1)
            columns += weights.sum(1)
            for i, slot in enumerate(slots.tolist()):
                diagonals[..., : slot + 1] += weights[:, i, :, : slot + 1].flip(-1)
        columns[..., : self.first] = diagonals[..., : self.nearest] = _CHOSEN
        return columns, diagonals

    @cached_property
    def pooled(self) -> Tensor:
        """Mean keys [b, heads, blocks, d] of the blocks that are full, float32."""
        full = self.n // self.block * self.block
        b, h, _, d = self.key.shape
        mean = self.key[:, :, :full].float().reshape(b, h, -1, self.block, d).mean(3)
        return mean.repeat_interleave(self.reading.queries.rotated.shape[1] // mean.shape[1], dim=1)

    def worth(self, pattern: Pattern, heads: list[int], start: int, row: int, stop: int) -> Tensor:
        """What the tokens before slot ``start``, where a block begins of which these are query rows ``row`` to
        ``stop``, are worth to these ``heads`` [b, heads, start]: infinity for those that their pattern has, and for
        others how near they come."""
        tokens = torch.arange(start, device=self.reading.segment.device)
        if pattern.kind == "vertical_slash":
            columns, diagonals = self.sums[0][:, heads], self.reached(pattern.sizes[1])[:, heads]
            worth = columns[..., :start].masked_fill(diagonals[..., 1 : start + 1].flip(-1), _CHOSEN)
            best = self.among(columns, pattern.sizes[0])[..., :start]
            # Forced columns are among the best.
            return worth.masked_fill(best, _CHOSEN)
        if pattern.kind == "a_shape":
            sinks, local = pattern.sizes
            own = (tokens < sinks) | (tokens > start - local)
            return tokens.float().masked_fill(own, _CHOSEN).expand(len(self.reading.rows), len(heads), -1)
        mean = self.reading.queries.rotated[:, heads, row:stop].float().mean(2)
        keys = self.pooled[:, heads, : start // self.block]
        scores = torch.einsum("bhd,bhnd->bhn", mean, keys)
        # The block itself is one of them.
        return scores.masked_fill(self.among(scores, pattern.sizes[0] - 1), _CHOSEN).repeat_interleave(self.block, -1)

    def reached(self, slash: int) -> Tensor:
        """Bool [b, heads, n]: whether one of the ``slash`` best diagonals goes from any row of a block to the token so
        far before its first row."""
        if slash not in self._reached:
            chosen = self.among(self.sums[1], slash).float()
            wide = torch.nn.functional.pad(chosen, (0, self.block - 1)).cumsum(-1)
            before = torch.nn.functional.pad(wide, (1, 0))
            self._reached[slash] = before[..., self.block :] > before[..., : -self.block]
        return self._reached[slash]

    def __post_init__(self) -> None:
        self._reached: dict[int, Tensor] = {}

    @staticmethod
    def among(scores: Tensor, k: int) -> Tensor:
        """Bool, like ``scores`` [..., n]: the ``k`` largest."""
        best = kernels.top_k(scores, min(k, scores.shape[-1]))
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
