"""Sketch: coarse copies of the keys, from which heads vote."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvote.index.column import KeyPages
from kvote.store.pages import PAGE, Lane

NAME = "sketch"


@dataclass(frozen=True)
class SketchIndex:
    """Codes of ``bits`` (4 or 8) per channel and a scale per token, where kernels read such; else keys are scored."""

    bits: int
    name, required, whole_layers = NAME, False, False

    def token_bytes(self, dim: int, dtype: torch.dtype) -> float:
        return dim * self.bits / 8 + 2

    def column(self, keys: KeyPages, layer: int) -> "Sketch | None":
        size = keys.kernels.sketch_bytes(keys.pool.keys.shape[-1], self.bits)
        if not size:
            return None
        keys.pool.add(NAME, PAGE // keys.kernels.SKETCH_TOKENS * size, dtype=torch.uint8)
        return Sketch(keys, self.bits)


@dataclass
class Sketch:
    """Sketches uint8 [pages, bytes] of the keys of a segment."""

    keys: KeyPages
    bits: int
    nbytes = 0
    # Whether ``winners`` takes ``skip``.
    skips = True

    @property
    def coded(self) -> tuple[Tensor, int]:
        return self.keys.pool.parts[NAME], self.bits

    def write(self, lanes: Sequence[Lane], start: int, key: Tensor) -> None:
        pool, stop = self.keys.pool, start + key.shape[2]
        slots = torch.cat([pool.slots(lane, start, stop) for lane in lanes])
        self.keys.kernels.sketch(pool.keys, *self.coded, slots)

    def votes(self, query: Tensor, rows: list[int], start: int, limits: list[int]) -> Tensor:
        """Votes like those of ``Segment.votes``, scored with the sketch."""
        keys, table = self.keys.pool.keys, self.keys.table(rows)
        return self.keys.kernels.votes(query, keys, table, *self.coded, start, limits)

    def winners(
        self,
        query: Tensor,
        rows: list[int],
        start: int,
        limits: list[int],
        k: int,
        nominate: int = 0,
        skip: Tensor | None = None,
    ) -> Tensor:
        """As ``Segment.winners``, by votes from the sketch.

        ``nominate``: how many tokens the sketch only nominates, to be scored again with their keys; 0 trusts it.
        ``skip`` bool [b]: sequences whose answer is not used.
        """
        # Where half of all candidates would be nominated, reading their keys at once costs less.
        helps = 2 * nominate < min(limits) - start
        sketch, bits, nominate = (*self.coded, nominate) if helps else (None, 0, 0)
        keys, table = self.keys.pool.keys, self.keys.table(rows)
        return self.keys.kernels.select(query, keys, table, sketch, bits, start, limits, k, nominate, skip)
