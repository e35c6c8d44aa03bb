"""Defaults of keepers, and the keeper that keeps everything."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvote.keep.keeper import Held, Share
from kvote.keep.observation import Observation
from kvote.read.tokens import Queries
from kvote.store.segment import Logits


class Plain:
    """Defaults of keepers."""

    per_head = False
    adds_up = False
    waits = False
    token_bytes = 0
    while_generating = True
    per_layer = True
    cascades = False
    needs_plain_keys = False
    needs_rope = False
    echo = 0
    splits = False

    def split(self, layer: int, heads: int) -> Sequence[Share] | None:
        return None

    def due(self, memory: Any) -> bool:
        return False

    def observes(self, ahead: int | None) -> bool:
        return False

    def observe(self, seen: Observation, memory: Any) -> None:
        """Nothing is shown to those that do not ask."""

    def aside(self, queries: Queries, rows: list[int], logits: Logits, memory: Any) -> tuple[Tensor, Tensor] | None:
        return None


class Blind(Plain):
    """Keepers that look at no attention, so that all layers keep the same tokens."""

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
