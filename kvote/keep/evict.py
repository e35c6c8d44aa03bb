"""Evict: who goes, by any score and any division of the budget. Sinks, recent tokens, bursts, heads apart or together,
prompts and generated tokens are settled here, once for all scores."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from kvote import kernels
from kvote.errors import MethodError
from kvote.keep.allocate.allocation import Allocation, Even
from kvote.keep.allocate.over_heads import OverHeads, evict_per_head
from kvote.keep.budget import Budget, after_burst, check_burst, whole
from kvote.keep.keeper import HeadAssignment, Held, Kept
from kvote.keep.observation import Observation
from kvote.keep.score.recency import Recency
from kvote.keep.score.score import Score
from kvote.needs import KeeperOffers, Needs
from kvote.numbers import check_flags, check_whole
from kvote.store.pages import PAGE
from kvote.store.segment import Scaling
from kvote.tokens import Queries


@dataclass(frozen=True)
class Cut:
    """The tokens of a sequence that stay: ``slots`` [h, m] or [1, m], ascending: first ``sinks``, then those ``chosen``
    by their worth, then recent ones; ``worth`` [h, n] or [1, n] of the tokens that were held."""

    slots: Tensor
    worth: Tensor
    sinks: int
    chosen: int


class Merge(Protocol):
    """Merges tokens that are dropped into others. ``adds_up``: what it remembers cannot be taken back; a merge that
    remembers something is for a score that does not."""

    @property
    def adds_up(self) -> bool: ...
    @property
    def needs(self) -> Needs: ...
    def new_memory(self) -> Any: ...
    def merged(self, held: Held, memory: Any, cut: Cut) -> tuple[Tensor, Tensor] | None:
        """``Kept.content``; None: the tokens that stay hold what they held."""
        ...

    def slotless_attention(
        self, queries: Queries, rows: list[int], scaling: Scaling, memory: Any
    ) -> tuple[Tensor, Tensor] | None:
        """Does what ``Keeper.slotless_attention`` does."""
        ...


class Choice(Protocol):
    """Which of the tokens that compete stay, where it is not those of the largest worth alone."""

    def chosen(self, worth: Tensor, count: int) -> Tensor:
        """Which ``count`` of n tokens stay of each row of ``worth`` [h, n]: [h, count], ascending."""
        ...


@dataclass(frozen=True)
class Largest:
    """The tokens of the largest worth."""

    def chosen(self, worth: Tensor, count: int) -> Tensor:
        return kernels.top_k(worth, count)


@dataclass(frozen=True)
class Evict:
    """The first ``sinks`` tokens and the last ``window`` ones stay (a fraction: that share of all but the sinks), and
    besides them those of the largest ``score``, up to the ``budget``, which ``allocate`` divides over layers, and
    ``over_heads`` over the key heads of a layer; None: evenly.

    ``evict_generated``: whether generated tokens make some go, a ``burst`` at a time, or come on top until the next
    prompt ends; before anything goes, they may exceed the budget by ``slack``. ``waits``: an announced prompt stays
    whole until its end. ``merge``: what becomes of what goes; None: it is gone. ``choose``: whether those of the
    largest score stay, or others among them. Raises MethodError for numbers that make no sense.
    """

    score: Score
    budget: Budget
    window: int | float = 1
    sinks: int = 0
    evict_generated: bool = True
    burst: int | None = None
    allocate: Allocation = field(default_factory=Even)
    merge: Merge | None = None
    slack: int = 0
    waits: bool = True
    over_heads: OverHeads | None = None
    choose: Choice = field(default_factory=Largest)

    def __post_init__(self) -> None:
        plain = self.merge is None and isinstance(self.choose, Largest)
        if self.over_heads is not None and not (self.score.per_head and self.score.uneven and plain):
            raise MethodError(
                "a budget is divided over key heads only where each keeps its own tokens (per_head=True), the best "
                "stay, nothing is merged, and the score says that heads may differ in length (uneven); got "
                f"{type(self.score).__name__}."
            )
        check_whole(self, sinks=0)
        check_flags(self, "evict_generated")
        check_burst(self.burst)
        if not isinstance(self.window, float):
            check_whole(self, window=1)
        if self.budget.unit == "tokens" and self.budget.amount < self.always + self.score.spare:
            named = [f"the {self.sinks} sinks"] if self.sinks else []
            named += [] if isinstance(self.window, float) else [f"the window of {self.window}"]
            verb, stay = "exceed" if self.score.spare else "cover", "stays" if named[0].startswith("the w") else "stay"
            raise MethodError(
                f"budget must {verb} {' and '.join(named)}, which always {stay}; got {self.budget.amount}."
            )

    @cached_property
    def always(self) -> int:
        """Tokens that stay whatever the budget."""
        return self.sinks + (0 if isinstance(self.window, float) else self.window)

    @cached_property
    def needs(self) -> Needs:
        own = self.score.needs if self.merge is None else self.score.needs | self.merge.needs
        return own if self.over_heads is None else own | Needs(uneven_heads=True)

    @cached_property
    def offers(self) -> KeeperOffers:
        return KeeperOffers(
            drops_generated=self.evict_generated,
            waits=self.waits,
            equal_heads=not self.score.per_head,
            equal_layers=not (self.score.per_layer or self.allocate.per_layer),
            adds_up=self.score.adds_up or (self.merge is not None and self.merge.adds_up),
            cascades=self.allocate.cascades,
            layers_alike=self.score.layers_alike,
        )

    @property
    def token_bytes(self) -> int:
        return self.score.token_bytes

    def split(self, layer: int, heads: int) -> Sequence[HeadAssignment] | None:
        return None

    def new_memory(self) -> Any:
        own = None if self.merge is None else self.merge.new_memory()
        return self.score.new_memory() if own is None else own

    def due(self, memory: Any) -> bool:
        return self.score.due(memory)

    def observes(self, prompt_left: int | None) -> bool:
        return self.score.observes(prompt_left)

    def observe(self, seen: Observation, memory: Any) -> None:
        self.score.observe(seen, memory)

    def survivors(self, held: Held, memory: Any) -> Kept | None:
        above, kept, ended = 0, None, self.score.ended(held, memory)
        if ended or self.evict_generated:
            spent = self.always + (self._margin(held.layers) if self.budget.unit == "bytes" else 0)
            # A share of the budget is for one recent token at least.
            least = 1 if isinstance(self.window, float) else 0
            most = self.allocate.tokens(held, memory, max(held.budget - spent, least))
            if most is not None:
                above = held.mean - self.always - most
                if above > (0 if ended else self.slack):
                    kept = self._cut(held, memory, most if ended else after_burst(most, self.burst))
        self.score.settled(held, memory, above > 0 and kept is None)
        return kept

    def _margin(self, layers: int) -> int:
        # Heads that differ in length need up to a page more each; steps of rounding are within it.
        return self.allocate.margin(layers) + (PAGE + 1 if self.over_heads is not None else 0)

    def _cut(self, held: Held, memory: Any, stays: int) -> Kept | None:
        """``stays``: tokens besides those that always stay."""
        chosen = whole(stays * (1 - self.window)) if isinstance(self.window, float) else stays
        edge = held.length - (self.always - self.sinks + stays - chosen)
        worth = self.score.of(held, memory, edge)
        if worth is None:
            return None
        if self.over_heads is not None:
            return evict_per_head(worth, held, self.over_heads, edge, self.sinks, chosen)
        worth = worth if self.score.per_head else worth.sum(dim=0, keepdim=True)
        edge = min(edge, worth.shape[1])
        if edge - self.sinks <= chosen:
            return None
        first = torch.arange(self.sinks, device=worth.device).expand(len(worth), -1)
        last = torch.arange(edge, held.length, device=worth.device).expand(len(worth), -1)
        best = [self.choose.chosen(worth[:, self.sinks : edge], chosen) + self.sinks] if chosen else []
        slots = torch.cat([first, *best, last], dim=1)
        cut = Cut(slots, worth, self.sinks, chosen)
        content = None if self.merge is None else self.merge.merged(held, memory, cut)
        return Kept(slots if len(slots) > 1 else slots[0], content)

    def slotless_attention(
        self, queries: Queries, rows: list[int], scaling: Scaling, memory: Any
    ) -> tuple[Tensor, Tensor] | None:
        return None if self.merge is None else self.merge.slotless_attention(queries, rows, scaling, memory)


def sinks_and_recent(sinks: int, window: int, burst: int | None = None) -> Evict:
    """The first ``sinks`` tokens and the last ``window`` ones after every pass, the same in all heads and layers; while
    generating, up to ``burst`` - 1 fewer of these."""
    return Evict(Recency(), Budget(sinks + window), window=1.0, sinks=sinks, burst=burst, waits=False)


def recent_share(recent: object) -> float:
    """Raises MethodError unless it is a share of a budget that can be for recent tokens."""
    if not isinstance(recent, int | float) or isinstance(recent, bool) or not 0 < recent <= 1:
        raise MethodError(f"recent must be a share of the budget, above 0 and at most 1; got {recent!r}.")
    return float(recent)
