"""Segment: the tokens of some key heads of one layer, in the form that a store gives them. The one storage abstraction:
readers, keepers and layers see only this."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvote.extra_inputs import ExtraInputs
from kvote.index.column import Index
from kvote.needs import Needs, StoreOffers
from kvote.rope import Rope
from kvote.tokens import Queries, TokenSet


@dataclass(frozen=True)
class Scaling:
    """What the model does to q.k before the softmax: its scale, and a tanh soft cap if it has one."""

    scale: float
    softcap: float | None = None


# Of a segment whose tokens are not all held as the model made them.
NO_INDEXES: Mapping[str, Any] = MappingProxyType({})


class Segment(Protocol):
    """``rows`` are sequences of equal length in this segment; tokens are named by their slot within the sequence."""

    heads: int
    # Whether ``winners`` also takes ``skip``, bool [b]: sequences whose winners nobody will look at.
    skips: bool

    @property
    def indexes(self) -> Mapping[str, Any]:
        """The indexes over its keys, by name, as ``kvote.index`` has them."""
        ...

    @property
    def sequences(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def length(self, row: int) -> int: ...
    def add_sequences(self, count: int) -> None:
        """Adds ``count`` sequences without tokens."""
        ...

    def reserve(self, tokens: int) -> None:
        """Makes room for ``tokens`` more tokens of every sequence in one piece, where that helps."""
        ...

    def append(self, rows: list[int], key: Tensor, value: Tensor, positions: Tensor) -> None:
        """Adds tokens: ``key`` [b, h, t, d], ``value`` [b, h, t, dv], original ``positions`` [b, t]."""
        ...

    def observe_queries(
        self, queries: Queries, rows: list[int], prompt_left: int | None, extra_bytes: ExtraInputs | None = None
    ) -> None:
        """Sees the queries of the pass whose tokens were just added, and what the store needs ``extra_bytes`` them;
        ``prompt_left`` as in ``keep.Observation``."""
        ...

    def checkpoint(self) -> Any:
        """What ``restore`` needs to forget what ``append``, ``observe_queries`` and reading add from now on. Cheap."""
        ...

    def restore(self, checkpoint: Any) -> bool:
        """Back to ``checkpoint``, wherever ``append`` or ``observe_queries`` were interrupted; nothing was kept or
        compressed since. False where that cannot be, because pages were being moved."""
        ...

    def compress(self, prompt_left: int) -> bool:
        """May encode what is old enough, and says whether it did. Called after every pass, once nothing can be rolled
        back any more without a crop; ``prompt_left`` tokens of an announced prompt are still to come."""
        ...

    def slotless_attention(self, queries: Queries, rows: list[int], scaling: Scaling) -> tuple[Tensor, Tensor] | None:
        """What tokens answer that every query reads although they have no slot; None if there are none."""
        ...

    def attend(self, queries: Queries, rows: list[int], tokens: TokenSet, scaling: Scaling) -> tuple[Tensor, Tensor]:
        """Softmax attention over ``tokens``: out [b, heads, t, dv] and its log-sum-exp [b, heads, t]."""
        ...

    def attention_mass(
        self, queries: Queries, lse: Tensor, rows: list[int], tokens: TokenSet, scaling: Scaling
    ) -> Tensor:
        """Attention [b, h, q, m] that each token of each of the q lists of ``tokens`` received in every key head,
        [b, heads, q, m] where query heads have lists of their own.

        ``lse`` [b, heads, t]: that of all tokens that a query row read, of which ``tokens`` may be a part.
        """
        ...

    def scores(self, query: Tensor, rows: list[int], start: int, stop: int) -> Tensor:
        """q.k of ``query`` [b, heads, r, d] with tokens ``start`` to ``stop`` at position 0: [b, r, heads, n]."""
        ...

    def votes(self, query: Tensor, rows: list[int], start: int, limits: list[int]) -> Tensor:
        """Soft votes [b, r, n] of ``query`` [b, heads, r, d] on tokens ``start`` to ``limits[-1]``."""
        ...

    def winners(self, query: Tensor, rows: list[int], start: int, limits: list[int], k: int) -> Tensor:
        """The ``k`` tokens [b, r, k] with the most votes, ascending."""
        ...

    def decode(self, rows: list[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The tokens themselves as stored, keys [b, h, n, d] and values [b, h, n, dv]."""
        ...

    def positions(self, row: int) -> list[Tensor]:
        """Original positions of the tokens held, one int32 tensor per key head."""
        ...

    def keep(self, row: int, slots: Tensor, content: tuple[Tensor, Tensor] | None = None) -> None:
        """Drops every token of a sequence but those in ``slots``, ascending: [m], or [h, m] to differ by key head.

        ``content``: what these tokens hold from now on, keys [h, m, d] and values [h, m, dv], where others have been
        merged into them.
        """
        ...

    def truncate(self, row: int, length: int) -> None:
        """Forgets the last tokens of a sequence, down to ``length``."""
        ...

    def select(self, index: list[int]) -> None:
        """Makes sequence i a copy of the former sequence ``index[i]``."""
        ...

    def trim(self) -> None:
        """Gives back memory that is no longer used."""
        ...

    def tokens_within(self, nbytes: float, extra_bytes: int = 0) -> int:
        """How many tokens of each sequence fit into ``nbytes``, with ``extra_bytes`` bytes per token and key head."""
        ...

    @property
    def nbytes(self) -> int: ...


@runtime_checkable
class Indexed(Segment, Protocol):
    """A segment that can keep indexes over its keys."""

    def add_index(self, index: Index, layer: int) -> None:
        """Keeps what ``index`` derives from the keys of layer ``layer``, of the tokens held and of those to come."""
        ...


class Store(Protocol):
    """Decides in which form tokens are held. ``needs`` and ``offers``: as ``kvote.needs`` has them."""

    @property
    def needs(self) -> Needs: ...
    @property
    def offers(self) -> StoreOffers: ...
    def new_segment(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None) -> Segment:
        """An empty segment for keys like ``like`` in size, dtype and device; with a ``rope``, at position 0."""
        ...

    def token_bytes(self, heads: int, dim: int, dtype: torch.dtype) -> float:
        """Bytes of a token of one key head once it is encoded, of ``heads`` of ``dim`` channels in the layer."""
        ...

    def after_layer(self, segments: Sequence[Segment | None], index: int, prompt_left: int) -> bool:
        """After the pass of layer ``index`` among the ``segments`` of all layers, None where no token has come yet.
        Says whether anything was encoded.

        Called of stores that offer ``shares_layers`` only.
        """
        ...


@runtime_checkable
class ByLayer(Store, Protocol):
    """A store that holds layers differently."""

    def of_layer(self, index: int) -> Store:
        """The store of layer ``index``."""
        ...
