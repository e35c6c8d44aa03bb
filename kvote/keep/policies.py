"""Defaults of keepers, and the keeper that keeps everything."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvote.keep.keeper import HeadAssignment, Held
from kvote.keep.observation import Observation
from kvote.needs import ANYWHERE, NOTHING, KeeperOffers, Needs
from kvote.store.segment import Scaling
from kvote.tokens import Queries


class KeeperDefaults:
    """Defaults of keepers."""

    token_bytes = 0

    @property
    def needs(self) -> Needs:
        return NOTHING

    @property
    def offers(self) -> KeeperOffers:
        return KeeperOffers()

    def split(self, layer: int, heads: int) -> Sequence[HeadAssignment] | None:
        return None

    def due(self, memory: Any) -> bool:
        return False

    def observes(self, prompt_left: int | None) -> bool:
        return False

    def observe(self, seen: Observation, memory: Any) -> None:
        """Nothing is shown to those that do not ask."""

    def slotless_attention(
        self, queries: Queries, rows: list[int], scaling: Scaling, memory: Any
    ) -> tuple[Tensor, Tensor] | None:
        return None


class AttentionFreeKeeper(KeeperDefaults):
    """Keepers that look at no attention, so that all layers keep the same tokens."""

    @property
    def offers(self) -> KeeperOffers:
        return KeeperOffers(equal_layers=True)

    def new_memory(self) -> None:
        return None


@dataclass(frozen=True)
class KeepAll(AttentionFreeKeeper):
    """Every token stays."""

    @property
    def offers(self) -> KeeperOffers:
        return KeeperOffers(drops=False, drops_generated=False, equal_layers=True, cuts=ANYWHERE)

    @property
    def budget(self) -> None:
        return None

    def survivors(self, held: Held, memory: None) -> None:
        return None
