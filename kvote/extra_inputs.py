"""Inputs of a pass besides queries, keys and values, for methods that ask for them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# What the ``extra_inputs`` of ``needs`` may name.
IDS, HIDDEN, MARKS, INPUTS = "token ids", "hidden states", "marks", "layer inputs"


@dataclass(frozen=True)
class ExtraInputs:
    """``ids`` [b, t] int64 of the new tokens; ``hidden`` [b, t, width], the states that the attention module projects
    to queries, keys and values; ``marks``: by the name of marked spans (``Cache.mark_span``), which tokens are in one,
    bool [b, t]; ``inputs`` [b, t, width], the states that enter the layer, before any normalisation. None where no part
    of the method needs it."""

    ids: Tensor | None = None
    hidden: Tensor | None = None
    marks: Mapping[str, Tensor] | None = None
    inputs: Tensor | None = None

    def marked(self, name: str) -> Tensor:
        """Which tokens are in a span of that ``name``, bool [b, t]; none where there is no such span. For a method that
        needs marks."""
        assert self.marks
        return self.marks[name] if name in self.marks else torch.zeros_like(next(iter(self.marks.values())))

    def at(self, row: int, start: int, stop: int) -> "ExtraInputs":
        """Columns ``start`` to ``stop`` of one row."""
        return self.each(lambda x: x[row : row + 1, start:stop])

    def each(self, function: Callable[[Tensor], Tensor]) -> "ExtraInputs":
        """Applies ``function`` to every tensor."""
        each = (None if x is None else function(x) for x in (self.ids, self.hidden, self.inputs))
        ids, hidden, inputs = each
        marks = None if self.marks is None else {name: function(x) for name, x in self.marks.items()}
        return replace(self, ids=ids, hidden=hidden, marks=marks, inputs=inputs)

    @property
    def observed(self) -> "ExtraInputs":
        """Without what only a store is shown."""
        return self if self.inputs is None else replace(self, inputs=None)

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.ids, self.hidden, self.inputs, *(self.marks or {}).values()) if x is not None]
