"""Every layer keeps the same share of the attention that its prompt received, in as few tokens as that takes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvote.keep.keeper import Held
from kvote.keep.score.prompt_attention import PromptMass
from kvote.store.pages import PAGE

# How far from the number of tokens that are to go a search may end, and after how many halvings it does.
_CLOSE, _HALVINGS = 5, 60


@dataclass(frozen=True)
class SameShare:
    """For ``PromptMass``, once all layers have been through a prompt. The first ``sinks`` and the last ``window``
    tokens are kept besides. ``grows``: while generating, what a layer may hold grows with the text."""

    sinks: int
    window: int
    grows: bool
    cascades: bool = True
    per_layer: bool = True

    def margin(self, layers: int) -> int:
        # Layers that differ in length need up to a page more each; what goes is rounded down.
        return PAGE + 1

    def tokens(self, held: Held, memory: PromptMass, mean: int) -> int | None:
        always = self.sinks + self.window
        if held.row in memory.rows:
            if held.observed < held.layers:
                return None
            if held.row not in memory.shares:
                self._divide(held, mean + always)
            return memory.shares.pop(held.row) - always
        kept = memory.kept.get(held.row)
        if kept is None:
            return mean
        if self.grows:
            kept = math.ceil(held.seen * kept / memory.texts[held.row] - 1e-9)
        return kept - always

    def _divide(self, held: Held, mean: int) -> None:
        """Notes in the memory of every layer how many tokens it may hold."""
        row, worth = held.row, [memory.rows[held.row][0] for memory in held.memories]
        total = sum(map(len, worth)) - mean * len(worth)
        goes = forgotten(worth, total, self.sinks + self.window)
        for memory, part, gone in zip(held.memories, worth, goes, strict=True):
            memory.shares[row] = len(part) - gone
            memory.kept.pop(row, None)
            if total > 0:
                memory.kept[row], memory.texts[row] = len(part) - gone, held.seen


def forgotten(worth: Sequence[Tensor], total: int, protected: int) -> list[int]:
    """How many tokens of each layer go, ``total`` of all or up to one less per layer; ``worth`` [n] of its tokens.

    By bisection a share is found such that the fewest tokens with that share of a layer's worth, and ``protected``
    ones, are what it keeps; what goes is then scaled to ``total`` and rounded down. None go if ``total`` is not
    positive.
    """
    if total <= 0:
        return [0] * len(worth)
    sums = [part.double().sort(descending=True).values.cumsum(0) for part in worth]
    sums = [part / part[-1].clamp_min(1e-300) for part in sums]
    least, most = 0.0, 1.0
    for _ in range(_HALVINGS):
        share = (least + most) / 2
        goes = [max(0, len(part) - prefix(part, share) - protected) for part in sums]
        if abs(sum(goes) - total) < _CLOSE:
            break
        least, most = (share, most) if sum(goes) > total else (least, share)
    scale = total / max(1, sum(goes))
    return [min(int(gone * scale + 1e-9), len(part) - protected) for gone, part in zip(goes, worth, strict=True)]


def prefix(sums: Tensor, share: float) -> int:
    """The fewest tokens that have ``share`` of all, given rising ``sums`` [n] that end with 1."""
    at = torch.searchsorted(sums, torch.tensor(share, dtype=sums.dtype, device=sums.device))
    return min(int(at) + 1, len(sums))
