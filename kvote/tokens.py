"""TokenSet: what a block of queries reads. Readers produce these, segments consume them."""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

Positions = Literal["original", "contiguous", "together"]


@dataclass(frozen=True)
class TokenSet:
    """Tokens, and where they stand for the queries that read them.

    ``index``: slots within the lane, ascending; int64 [b, q, m] for q blocks of queries of equal size, [b, heads, q, m]
    where every query head has a list of its own, or a range of neighbours that all queries share. ``causal``: the last
    rows of the list are the queries themselves, row i of r sees list entries up to m - r + i, and with ``window`` only
    the last ``window`` of those. ``positions``: the tokens' own, or 0 .. m - 1 in list order with the queries at the
    end of the list, or all at ``query_at``; or all tokens together at 0, and all queries at ``query_at``.
    """

    index: Tensor | range
    causal: bool = True
    window: int | None = None
    positions: Positions = "original"
    query_at: int | None = None

    @property
    def blocks(self) -> int:
        return 1 if isinstance(self.index, range) else self.index.shape[-2]

    @property
    def by_head(self) -> bool:
        """Whether query heads read different tokens."""
        return isinstance(self.index, Tensor) and self.index.dim() == 4

    def of_rows(self, count: int, start: int, stop: int) -> "TokenSet":
        """The tokens that query rows ``start`` to ``stop`` read, where this is the set of ``count`` rows."""
        if isinstance(self.index, Tensor) and self.blocks == count:
            return replace(self, index=self.index[..., start:stop, :])
        if self.blocks > 1:
            raise ValueError("Blocks of several rows cannot be cut.")
        if not self.causal or stop == count:
            return self
        seen = len(self) - (count - stop)
        index = self.index[:seen] if isinstance(self.index, range) else self.index[..., :seen]
        return replace(self, index=index)

    def __len__(self) -> int:
        """Tokens that each query reads."""
        return len(self.index) if isinstance(self.index, range) else self.index.shape[-1]


@dataclass(frozen=True)
class Unread:
    """A stand-in for the tokens that queries do not read: ``value`` [b, heads, t, dv], and the logarithm ``beyond`` [b,
    heads, t] of their softmax mass, as a multiple of the mass of the tokens that are read."""

    value: Tensor
    beyond: Tensor

    def beside(self, out: Tensor, lse: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Both answers, to be merged: that of the tokens read, with its log-sum-exp, and this."""
        return [(out, lse), (self.value, lse + self.beyond)]


@dataclass(frozen=True)
class Span:
    """Query rows ``start`` to ``stop`` of a forward pass, the disjoint token sets that they read, and what stands for
    the others, if anything does."""

    start: int
    stop: int
    reads: list[TokenSet]
    unread: Unread | None = None

    def in_place(self, length: int) -> "Span":
        """The same with tokens at their own positions, if they are all ``length`` that are held: where some rows of a
        batch are padded on the right, a model gives what comes behind the padding positions that it has had before."""
        read = self.reads[0]
        whole = len(self.reads) == 1 and isinstance(read.index, range) and read.index == range(length)
        if not whole or (read.window is not None and read.window < length):
            return self
        return replace(self, reads=[replace(read, positions="original", query_at=None)])


@dataclass(frozen=True)
class Queries:
    """Query rows [b, heads, t, d]: rotated by the model, and at position 0 where a reader or a store needs that."""

    rotated: Tensor
    unrotated: Tensor | None = None

    def rows(self, start: int, stop: int) -> "Queries":
        if start == 0 and stop == self.rotated.shape[2]:
            return self
        unrotated = None if self.unrotated is None else self.unrotated[:, :, start:stop]
        return Queries(self.rotated[:, :, start:stop], unrotated)

    def of_sequences(self, at: slice | list[int]) -> "Queries":
        return Queries(self.rotated[at], None if self.unrotated is None else self.unrotated[at])

    def of_heads(self, heads: slice) -> "Queries":
        return Queries(
            self.rotated[:, heads].contiguous(), None if self.unrotated is None else self.unrotated[:, heads]
        )
