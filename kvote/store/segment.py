"""Segment: some tokens of one layer in one form. The one storage abstraction; readers and layers see only this."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvote.read.tokens import Queries, TokenSet


@dataclass(frozen=True)
class Logits:
    """What the model does to q.k before the softmax: its scale, and a tanh soft cap if it has one."""

    scale: float
    softcap: float | None = None


class Segment(Protocol):
    """``rows`` are sequences of equal length in this segment; tokens are named by their slot within the sequence."""

    heads: int

    def length(self, row: int) -> int: ...
    def attend(self, queries: Queries, rows: list[int], tokens: TokenSet, logits: Logits) -> tuple[Tensor, Tensor]:
        """Softmax attention over ``tokens``: out [b, heads, t, dv] and its log-sum-exp [b, heads, t]."""
        ...

    def attention_mass(
        self, queries: Queries, lse: Tensor, rows: list[int], tokens: TokenSet, logits: Logits
    ) -> Tensor:
        """Attention [b, h, q, m] that each token of each of the q lists of ``tokens`` received in every key head.

        ``lse`` [b, heads, t]: that of all tokens that a query row read, of which ``tokens`` may be a part.
        """
        ...

    def scores(self, query: Tensor, rows: list[int], start: int, stop: int) -> Tensor:
        """q.k of ``query`` [b, heads, r, d] with tokens ``start`` to ``stop`` at position 0: [b, r, heads, n]."""
        ...

    def votes(self, query: Tensor, rows: list[int], start: int, limits: list[int]) -> Tensor:
        """Soft votes [b, r, n] of ``query`` [b, heads, r, d] on tokens ``start`` to ``limits[-1]``."""
        ...

    def winners(
        self, query: Tensor, rows: list[int], start: int, limits: list[int], k: int, nominate: int = 0
    ) -> Tensor:
        """The ``k`` tokens [b, r, k] with the most votes, ascending; a sketch may only ``nominate`` that many."""
        ...

    def decode(self, rows: list[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The tokens themselves as stored, keys [b, h, n, d] and values [b, h, n, dv]."""
        ...

    def keep(self, row: int, slots: Tensor) -> None:
        """Drops every token of a sequence but those in ``slots``, ascending: [m], or [h, m] to differ by key head."""
        ...

    def tokens_within(self, nbytes: float, beside: int = 0) -> int:
        """How many tokens of each sequence fit into ``nbytes``, with ``beside`` bytes per token and key head."""
        ...

    @property
    def nbytes(self) -> int: ...
