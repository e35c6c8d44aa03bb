"""The layers of a cache in their order."""

import copy
import weakref
from typing import Any, Generic, TypeVar

L = TypeVar("L")


class LayerStack(Generic[L]):
    """The layers of a cache in their order. It keeps none of them alive: layers that held each other would go with the
    next run of the garbage collector only, and gigabytes with them."""

    def __init__(self) -> None:
        self._members: list[weakref.ref[L]] = []

    @property
    def layers(self) -> list[L]:
        return [layer for member in self._members if (layer := member()) is not None]

    def __len__(self) -> int:
        return len(self._members)

    def __bool__(self) -> bool:
        return True

    def add(self, layer: L) -> int:
        """Adds a layer and returns its index."""
        self._members.append(weakref.ref(layer))
        return len(self._members) - 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "LayerStack[L]":
        clone = memo[id(self)] = LayerStack[L]()
        # Where a whole cache is copied, these are the copies that it holds.
        clone._members = [weakref.ref(copy.deepcopy(layer, memo)) for layer in self.layers]
        return clone
