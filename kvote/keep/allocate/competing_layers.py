"""Tokens of all layers and heads compete for one budget, once all have been judged."""

from dataclasses import dataclass

import torch

from kvote.keep.allocate.shares import shares
from kvote.keep.keeper import Held
from kvote.keep.score.repeat_attention import RepeatMemory
from kvote.store.pages import PAGE


@dataclass(frozen=True)
class CompetingLayers:
    """A layer holds the tokens that it has among the best of all layers, in whole tokens per key head; the first
    ``sinks`` and the last ``window`` do not compete. For a score that has judged all layers when the first is cut."""

    sinks: int
    window: int = 1
    cascades: bool = True
    per_layer: bool = True

    def margin(self, layers: int) -> int:
        # Layers that differ in length need up to a page more each.
        return PAGE

    def tokens(self, held: Held, memory: RepeatMemory, mean: int) -> int:
        if not memory.whole(held):
            return mean
        if held.row not in memory.shares:
            self._divide(held, mean)
        return memory.shares.pop(held.row)

    def _divide(self, held: Held, mean: int) -> None:
        """Notes the share of every layer in its memory."""
        judged = [memory.received[held.row] for memory in held.memories]
        worth = [layer[:, self.sinks : held.length - self.window].flatten() for layer in judged]
        together = torch.cat(worth)
        best = together.topk(min(len(together), mean * sum(map(len, judged))), sorted=False).indices
        ends = torch.tensor([len(layer) for layer in worth], device=best.device).cumsum(0)
        won = torch.bucketize(best, ends, right=True).bincount(minlength=len(worth))
        # In tokens per key head, of which layers may have different numbers.
        means = [count / len(layer) for count, layer in zip(won.tolist(), judged, strict=True)]
        caps = [held.length - self.sinks - self.window] * len(judged)
        given = shares(means, mean * len(judged), caps)
        for memory, share in zip(held.memories, given, strict=True):
            memory.shares[held.row] = share
