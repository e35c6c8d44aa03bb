"""Beside: what a pass brings along with queries, keys and values, for methods that say that they need it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from kvote.groups import Group

# What the ``beside`` of ``needs`` may name.
IDS, HIDDEN = "token ids", "hidden states"


@dataclass(frozen=True)
class Beside:
    """``ids`` [b, t] int64 of the new tokens; ``hidden`` [b, t, width], the states that the attention module projects
    to queries, keys and values. None where no part of the method needs it."""

    ids: Tensor | None = None
    hidden: Tensor | None = None

    def of(self, group: "Group") -> "Beside":
        """That of a group's rows, without padding."""
        if group.is_everything:
            return self
        return self._each(lambda x: group.cut(x[:, None])[:, 0])

    def at(self, row: int, start: int, stop: int) -> "Beside":
        """That of columns ``start`` to ``stop`` of one row."""
        return self._each(lambda x: x[row : row + 1, start:stop])

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Beside":
        ids, hidden = (None if x is None else function(x) for x in (self.ids, self.hidden))
        return replace(self, ids=ids, hidden=hidden)

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.ids, self.hidden) if x is not None]
