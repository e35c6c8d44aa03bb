"""Keeper: decides which tokens stay. What it may look at, and what it may remember."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvote.keep.budget import Budget
from kvote.keep.observation import Observation
from kvote.needs import KeeperOffers, Needs
from kvote.rope import Rope
from kvote.store.segment import Scaling, Segment
from kvote.tokens import Queries

# Tokens that are decoded at a time.
_TOKENS_HELD = 4096


@dataclass(frozen=True)
class Held:
    """One sequence when something may be dropped: its ``row`` in the ``segment``, the tokens it holds, and how many its
    budget allows. ``memories``: what is remembered of each layer of the cache, of which this is number ``layer`` and
    the first ``observed`` have been through this pass; empty unless the keeper ``cascades``. ``rope``: the rotation
    that is in the keys held, for a keeper that needs it; None where keys are held without. ``rotation``: the layer's
    rotation, in either case. ``generated``: whether all
    that came since the last such moment was generated: a prompt is cut down to its budget, generated tokens may go in
    bursts (``keep.budget.left``). ``layers``: how many there are; ``seen``: tokens of the sequence so far, dropped
    ones among them. ``lanes``: tokens of each key head, where they may differ; ``length`` is then the largest, and
    slots are places that are aligned at the heads' ends (``store.uneven``)."""

    row: int
    length: int
    budget: int
    segment: Segment
    memories: Sequence[Any]
    layer: int
    observed: int
    rope: Rope | None = None
    generated: bool = False
    layers: int = 1
    seen: int = 0
    rotation: Rope | None = None
    lanes: Sequence[int] = ()

    @property
    def mean(self) -> int:
        """Tokens that a key head holds on average, rounded up."""
        return -(-sum(self.lanes) // len(self.lanes)) if self.lanes else self.length

    def each(self, function: Callable[[Tensor, Tensor], Tensor], stop: int) -> Tensor:
        """The float32 results [h, stop] of ``function``, called with keys [h, m, d] and values [h, m, dv] in float32, a
        few thousand tokens at a time."""
        parts = []
        for start in range(0, stop, _TOKENS_HELD):
            key, value = self.segment.decode([self.row], start, min(stop, start + _TOKENS_HELD))
            parts.append(function(key[0].float(), value[0].float()))
        return torch.cat(parts, dim=1) if parts else torch.empty(self.segment.heads, 0, device=self.segment.device)


@dataclass(frozen=True)
class Kept:
    """``slots`` that stay, ascending: [m] for all key heads, or [h, m], with -1 in front where a key head keeps fewer
    than others. ``content``: keys [h, m, d] and values [h, m, dv] that they hold from now on, where dropped tokens were
    merged into them."""

    slots: Tensor
    content: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class HeadAssignment:
    """``heads``, key heads of a layer in ascending order, that ``keeper`` keeps in its own way.

    ``dense``: they keep their tokens as the model made them and read all of them, whatever store and reader the method
    is joined with: right where a few tokens are left, that come and go while generating. ``budget_shares``: how many
    shares of this size a budget of bytes is for; None: as many as layers.
    """

    heads: tuple[int, ...]
    keeper: "Keeper"
    dense: bool = False
    budget_shares: float | None = None


class Remembered(Protocol):
    """The memory of a keeper, per sequence; follows the tokens that it is about."""

    def select(self, index: list[int]) -> None:
        """Sequence i is now a copy of the former sequence ``index[i]``."""
        ...

    def keep(self, row: int, slots: Tensor) -> None:
        """Keeps ``slots`` of a sequence, [m] or [h, m], and drops the rest."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Keeps the first ``length`` tokens of a sequence."""
        ...

    @property
    def nbytes(self) -> int: ...


class Keeper(Protocol):
    """Decides which tokens of a sequence stay after a pass, all its key heads equally many.

    ``budget``: how many at most, None for no limit. ``token_bytes``: what it remembers for good, in bytes per token and
    key head. ``needs`` and ``offers``: as ``kvote.needs`` has them.
    """

    @property
    def budget(self) -> Budget | None: ...
    @property
    def token_bytes(self) -> int: ...
    @property
    def needs(self) -> Needs: ...
    @property
    def offers(self) -> KeeperOffers: ...

    def split(self, layer: int, heads: int) -> Sequence[HeadAssignment] | None:
        """Keepers for groups of the ``heads`` key heads of a layer, every head in one of them; None: one for all."""
        ...

    def new_memory(self) -> Any:
        """An empty memory (``Remembered``), or None."""
        ...

    def observes(self, prompt_left: int | None) -> bool:
        """Whether it wants to see a pass; ``prompt_left`` as in ``Observation``."""
        ...

    def observe(self, seen: Observation, memory: Any) -> None: ...

    def due(self, memory: Any) -> bool:
        """Whether tokens stay above the budget only because the prompt has not been read again. Asked of keepers with
        an ``repeat_chunk`` only."""
        ...

    def survivors(self, held: Held, memory: Any) -> Kept | None:
        """The tokens that stay; None keeps all."""
        ...

    def slotless_attention(
        self, queries: Queries, rows: list[int], scaling: Scaling, memory: Any
    ) -> tuple[Tensor, Tensor] | None:
        """Attention over what dropped tokens left behind, as ``Segment.attend`` returns it: out and log-sum-exp; None:
        nothing was left."""
        ...
