"""Blocks chosen by a probe in which unusual queries count more, in a number that layers share by their entropies."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kvote import kernels
from kvote.needs import ReaderOffers
from kvote.numbers import check_whole
from kvote.read.far_blocks import FarBlocks
from kvote.read.local_mass import LocalMass
from kvote.read.probed import Habit, Probed
from kvote.read.reader import Reading


@dataclass(frozen=True)
class ProbedBlocks(FarBlocks):
    """Parameters as in ``methods/actqkv.py``, which documents them."""

    least: int = 32
    ramp: int = 1000
    warm: int = 100

    # Rows of a batch read different numbers of blocks.
    offers = ReaderOffers(adds_up=True, alone=True)
    needs = replace(FarBlocks.needs, equal_layers=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, least=1, ramp=0, warm=1)

    def new_memory(self) -> Probed:
        return Probed(self.sinks, self.block)

    def _best(self, reading: Reading, memory: LocalMass, row: int, stop: int) -> Tensor:
        assert isinstance(memory, Probed)
        queries, keys = self._far_queries(reading, row, stop), self._represented(reading, memory)
        best = []
        for i, each in enumerate(reading.rows):
            window = queries[i].transpose(0, 1).flatten(1)
            old = memory.habits.get(each)
            if reading.recording:
                memory.past.setdefault(each, []).append((reading.first + stop, old))
            now = Habit.of(window) if old is None else old.met(window)
            scores = cosine_similarity(self._probe(reading, now, window)[None], keys[i].flatten(1), dim=1)
            count = self._count_of(reading, each, len(scores))
            memory.habits[each] = replace(now.scored(scores, self.warm), blocks=count)
            best.append(kernels.top_k(scores[None], count))
        return torch.cat(best)

    def _probe(self, reading: Reading, habit: Habit, window: Tensor) -> Tensor:
        """What the queries [m, channels] of a window ask together: their mean until enough windows were seen."""
        if habit.count * len(reading.memories) < self.ramp:
            return window.mean(0)
        return habit.weights(window) @ window

    def _count_of(self, reading: Reading, row: int, blocks: int) -> int:
        """How many of so many blocks are read: ``top_k``, or in a generated token this layer's share of what is left of
        that for all layers."""
        count, number, layers = self.top_k, reading.number, [self._habit(each, row) for each in reading.memories]
        entropies = [each.entropies for each in layers if each is not None and len(each.entropies) >= self.warm]
        if reading.decode and len(entropies) == len(layers):
            left = self.top_k * len(layers) - sum(each.blocks for each in layers[:number] if each is not None)
            means = [float(each.mean()) for each in entropies]
            count = round(left * means[number] / sum(means[number:]))
        return min(blocks, max(self.least, min(count, 2 * self.top_k)))

    def _habit(self, memory: object, row: int) -> Habit | None:
        return memory.habits.get(row) if isinstance(memory, Probed) else None
