"""Inputs of a pass besides queries, keys and values, for methods that ask for them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

# What ``Keeper.beside`` and ``Reader.beside`` may name.
IDS, HIDDEN = "token ids", "hidden states"


@dataclass(frozen=True)
class Beside:
    """``ids`` [b, t] int64 of the new tokens; ``hidden`` [b, t, width], the states that the attention module projects
    to queries, keys and values. None where no part of the method needs it."""

    ids: Tensor | None = None
    hidden: Tensor | None = None

    def at(self, row: int, start: int, stop: int) -> "Beside":
        """Columns ``start`` to ``stop`` of one row."""
        return self.each(lambda x: x[row : row + 1, start:stop])

    def each(self, function: Callable[[Tensor], Tensor]) -> "Beside":
        """Applies ``function`` to every tensor."""
        ids, hidden = (None if x is None else function(x) for x in (self.ids, self.hidden))
        return replace(self, ids=ids, hidden=hidden)

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.ids, self.hidden) if x is not None]
