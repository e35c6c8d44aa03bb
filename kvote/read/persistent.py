"""Tokens chosen in two layers and read in all others: positions persist from layer to layer."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvote.errors import MethodError
from kvote.memory import storage_bytes
from kvote.needs import ANYWHERE, ReaderOffers
from kvote.numbers import check_whole
from kvote.read.per_head import LISTS, ReadsLists, span_of, winners
from kvote.read.reader import Reading, everything
from kvote.tokens import Span


@dataclass
class ChosenTokens:
    """By sequence: the tokens [heads, 1, k] that a layer chose in its last step; empty where it chooses none.

    In every step they are replaced before another layer reads them, so there is nothing to forget.
    """

    index: dict[int, Tensor] = field(default_factory=dict)

    def select(self, index: list[int]) -> None:
        self.index.clear()

    def forget(self) -> None:
        pass

    def checkpoint(self) -> None:
        return None

    def restore(self, checkpoint: None) -> None:
        pass

    @property
    def nbytes(self) -> int:
        return storage_bytes(self.index.values())


@dataclass(frozen=True)
class PersistentPositions(ReadsLists):
    """Parameters as in ``methods/tidaldecode.py``, which documents them."""

    top_k: int
    first: int
    reselect: int | None

    def __post_init__(self) -> None:
        check_whole(self, top_k=1, first=0)
        if self.reselect is not None:
            check_whole(self, reselect=0)
        if self.reselect and self.reselect <= self.first:
            raise MethodError(
                f"reselect must be a layer after the first selecting one ({self.first}), or 0 for none; "
                f"got {self.reselect}."
            )

    needs = replace(LISTS, equal_layers=True)
    offers = ReaderOffers(cuts=ANYWHERE)

    def check(self, layers: int) -> None:
        self.selecting(layers)

    def new_memory(self) -> ChosenTokens:
        return ChosenTokens()

    def selecting(self, layers: int) -> tuple[int, ...]:
        """The layers, of ``layers``, that choose, in order. Raises MethodError if no other would read what they
        choose."""
        if self.first >= layers - 1:
            raise MethodError(
                f"There are {layers} layers with full attention, so none would read what layer {self.first} chooses; "
                f"first must be less than {layers - 1}."
            )
        if self.reselect is not None and self.reselect >= layers:
            raise MethodError(
                f"There are {layers} layers with full attention, so there is no layer {self.reselect} to choose anew; "
                "give a smaller one, or 0 for none."
            )
        reselect = self.reselect
        if reselect is None:
            reselect = max(self.first + 2, 13 * layers // 32)
            reselect = reselect if reselect < layers - 1 else 0
        return (self.first, reselect) if reselect else (self.first,)

    def read(self, reading: Reading) -> Iterator[Span]:
        n, number = reading.first + reading.count, reading.number
        selecting = self.selecting(len(reading.memories))
        if not reading.decode or number < self.first or n <= self.top_k:
            yield everything(reading)
        elif number in selecting:
            # What is chosen serves the layers after this one, which itself reads everything.
            scores = reading.segment.scores(reading.queries.rotated, reading.rows, 0, n)
            chosen = reading.memories[number]
            assert isinstance(chosen, ChosenTokens)
            chosen.index.update(zip(reading.rows, winners(scores, self.top_k), strict=True))
            reading.activity.selections += len(reading.rows)
            yield everything(reading)
        else:
            chosen = reading.memories[max(layer for layer in selecting if layer < number)]
            assert isinstance(chosen, ChosenTokens)
            reading.activity.reused += len(reading.rows)
            yield span_of(reading, torch.stack([chosen.index[row] for row in reading.rows]))
