"""Sketch: coarse copies of the keys, from which heads vote.

Real keys of a head have a large part in common, which adds the same to every score of a query and so changes no vote.
Sketches go without it, and spend their codes on what differs: what is encoded is a key less the centre of its lane, the
mean of the lane's first 64 tokens (its first page), or 0 until there are so many. A centre follows from keys that are
held, so it is no state of its own: it goes with copies, beams, rows and files, and only what rewrites the first page
changes it, which sketches the lane anew.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvote.index.column import KeyPages
from kvote.kernels.lanes import Lanes
from kvote.store.pages import PAGE, Lane

NAME = "sketch"
# The part of the pool. Files from before sketches had a centre name another, and are refused.
_PART = "centred sketch"


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
        keys.pool.add(_PART, PAGE // keys.kernels.SKETCH_TOKENS * size, dtype=torch.uint8)
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
        return self.keys.pool.parts[_PART], self.bits

    def write(self, lanes: Sequence[Lane], start: int, key: Tensor) -> None:
        # With the first page the centre of a lane changes, and with it all that was sketched about another.
        start, stop = 0 if start < PAGE else start, start + key.shape[2]
        where = Lanes([lane.runs for lane in lanes])
        self.keys.kernels.sketch(self.keys.pool.keys, *self.coded, where, start, stop)

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
        # Where half of all candidates would be nominated, reading their keys at once costs less. And kernels that score
        # again must know the centre: it is that of the first page if so many tokens are looked at.
        helps = 2 * nominate < min(limits) - start and (not nominate or max(limits) >= PAGE)
        sketch, bits, nominate = (*self.coded, nominate) if helps else (None, 0, 0)
        keys, table = self.keys.pool.keys, self.keys.table(rows)
        return self.keys.kernels.select(query, keys, table, sketch, bits, start, limits, k, nominate, skip)
