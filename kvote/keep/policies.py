"""Which tokens stay in memory after a forward pass, decided by their place in the text alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvote.keep.budget import Budget, check_burst, left
from kvote.keep.keeper import Held, Kept, Share
from kvote.keep.observation import Observation
from kvote.read.tokens import Queries
from kvote.store.segment import Logits


class Plain:
    """What keepers answer unless they have something special to say."""

    per_head = False
    adds_up = False
    waits = False
    token_bytes = 0
    while_generating = True
    per_layer = True
    cascades = False
    needs_plain_keys = False
    needs_rope = False
    splits = False

    def split(self, layer: int, heads: int) -> Sequence[Share] | None:
        return None

    def observes(self, ahead: int | None) -> bool:
        return False

    def observe(self, seen: Observation, memory: Any) -> None:
        """Nothing is shown to those that do not ask."""

    def aside(self, queries: Queries, rows: list[int], logits: Logits, memory: Any) -> tuple[Tensor, Tensor] | None:
        return None


class Blind(Plain):
    """Those that look at no attention, so that all layers keep the same."""

    per_layer = False

    def new_memory(self) -> None:
        return None


@dataclass(frozen=True)
class KeepAll(Blind):
    """Every token stays."""

    drops: bool = False

    @property
    def budget(self) -> None:
        return None

    def survivors(self, held: Held, memory: None) -> None:
        return None


@dataclass(frozen=True)
class KeepSinksAndRecent(Blind):
    """The first ``sinks`` tokens and the last ``window`` ones; while generating, up to ``burst`` - 1 fewer of these."""

    sinks: int
    window: int
    burst: int | None = None
    drops: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        check_burst(self.burst)

    @property
    def budget(self) -> Budget:
        return Budget(self.sinks + self.window)

    def survivors(self, held: Held, memory: None) -> Kept | None:
        if held.length <= self.sinks + self.window:
            return None
        recent = left(self.window, self.burst) if held.generated else self.window
        return Kept(torch.cat([torch.arange(self.sinks), torch.arange(held.length - recent, held.length)]))
