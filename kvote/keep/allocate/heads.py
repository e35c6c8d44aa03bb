"""Some key heads keep every token, the others few: which is which was found out beforehand, on the user's model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvote.errors import InputError
from kvote.keep.keeper import HeadAssignment, Held, Keeper
from kvote.keep.policies import AttentionFreeKeeper, KeepAll
from kvote.needs import KeeperOffers

# Scores of key heads, by layer of the model.
Scores = Mapping[int, Sequence[float]]
# A layer and one of its key heads.
Place = tuple[int, int]


def best(scores: Scores, count: int) -> set[Place]:
    """The ``count`` heads with the largest scores, over all layers together; equal ones in the model's order."""
    ranked = sorted((-score, layer, head) for layer, heads in scores.items() for head, score in enumerate(heads))
    return {(layer, head) for _, layer, head in ranked[:count]}


@dataclass(frozen=True)
class KeepByHead(AttentionFreeKeeper):
    """The ``whole`` heads keep every token, in the store and with the reader that the method is joined with; the others
    keep what ``few`` says, apart. ``heads``: key heads of each layer that was calibrated; ``name``: of what said so."""

    whole: frozenset[Place]
    heads: tuple[tuple[int, int], ...]
    few: Keeper
    name: str = "the calibration"

    @property
    def offers(self) -> KeeperOffers:
        # The heads that drop tokens are apart from the store, so nothing that it holds is dropped while generating.
        drops = self.others > 0
        return KeeperOffers(drops, drops_generated=False, equal_layers=not drops, whole_layers=False)

    @property
    def budget(self) -> None:
        return None

    @property
    def others(self) -> int:
        """Heads that do not keep everything, in all layers together."""
        return sum(heads for _, heads in self.heads) - len(self.whole)

    def split(self, layer: int, heads: int) -> list[HeadAssignment]:
        """The others first: what they refuse, they refuse before anything has changed. Raises InputError for a layer
        that was not calibrated."""
        if dict(self.heads).get(layer) != heads:
            raise InputError(
                f"{self.name} does not say which of the {heads} key heads of layer {layer} keep everything."
            )
        whole = tuple(head for head in range(heads) if (layer, head) in self.whole)
        others = tuple(head for head in range(heads) if (layer, head) not in self.whole)
        budget_shares = self.others / len(others) if others else None
        return [
            HeadAssignment(others, self.few, dense=True, budget_shares=budget_shares),
            HeadAssignment(whole, KeepAll()),
        ]

    def survivors(self, held: Held, memory: None) -> None:
        """The groups have keepers of their own, which decide."""
