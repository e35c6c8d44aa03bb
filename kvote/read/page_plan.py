"""Whole pages chosen in a few layers by the attention that they receive there, and read in the layers after each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvote import kernels
from kvote.errors import MethodError
from kvote.numbers import check_whole, is_whole
from kvote.read.per_head import LISTS, ReadsLists
from kvote.read.persistent import ChosenTokens
from kvote.read.reader import Reading, everything
from kvote.tokens import Span, TokenSet

# Layers of the models for which it was published.
_OF = 28


@dataclass(frozen=True)
class PagePlan(ReadsLists):
    """Parameters as in ``methods/delta.py``, which documents them."""

    full: tuple[int, ...] | None
    pages: int
    recent: int
    page: int

    def __post_init__(self) -> None:
        check_whole(self, pages=1, recent=1, page=1)
        if self.recent > self.pages:
            raise MethodError(f"recent must be at most pages ({self.pages}), of which it is a part; got {self.recent}.")
        if self.full is not None:
            numbers = isinstance(self.full, tuple) and all(map(is_whole, self.full))
            if not numbers or self.full[:1] != (0,) or list(self.full) != sorted(set(self.full)):
                raise MethodError(
                    "full must be a tuple of layers in ascending order, the first of them 0, since no layer can read "
                    f"what none before it has chosen; got {self.full!r}."
                )

    needs = replace(LISTS, equal_heads=True, equal_layers=True)

    def check(self, layers: int) -> None:
        self.roles(layers)

    def new_memory(self) -> ChosenTokens:
        return ChosenTokens()

    def roles(self, layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The layers, of ``layers``, that read everything, and those of them that choose. Raises MethodError if none
        reads less."""
        if self.full is None:
            full = tuple(sorted({i for i in (0, 1, 2, layers * 14 // _OF, layers * 22 // _OF) if i < layers - 1}))
        else:
            full = self.full
        if len(full) >= layers or not full or full[-1] >= layers:
            raise MethodError(
                f"There are {layers} layers with full attention, and full={full} has them all or others; name some of "
                f"0 to {layers - 1}, and leave some out."
            )
        return full, tuple(i for i in full if i + 1 < layers and i + 1 not in full)

    def read(self, reading: Reading) -> Iterator[Span]:
        n, number = reading.first + reading.count, reading.number
        full, planners = self.roles(len(reading.memories))
        if not reading.decode or n <= self.pages * self.page:
            yield everything(reading)
            return
        if number in full:
            if number in planners:
                # What is chosen serves the layers after this one, which itself reads everything.
                chosen = reading.memories[number]
                assert isinstance(chosen, ChosenTokens)
                chosen.index.update(zip(reading.rows, self._plan(reading, n), strict=True))
                reading.activity.selections += len(reading.rows)
            yield everything(reading)
            return
        chosen = reading.memories[max(layer for layer in planners if layer < number)]
        assert isinstance(chosen, ChosenTokens)
        index = torch.stack([chosen.index[row] for row in reading.rows])
        reading.activity.reused += len(reading.rows)
        reading.activity.tokens_read = index.shape[-1]
        yield Span(0, 1, [TokenSet(index, causal=False)])

    def _plan(self, reading: Reading, n: int) -> Tensor:
        """The tokens [b, 1, m] of the pages that receive the most attention, the last ones always among them."""
        scores = reading.segment.scores(reading.queries.rotated, reading.rows, 0, n)[:, 0]
        # A token is worth the attention of the head that attends to it most.
        worth = reading.scaled(scores).softmax(-1).amax(1)
        held = pad(worth, (0, -n % self.page)).view(len(worth), -1, self.page).sum(2)
        held[:, -self.recent :] = float("inf")
        best = kernels.top_k(held, self.pages)[..., None] * self.page
        tokens = (best + torch.arange(self.page, device=best.device)).flatten(1)
        # The newest page is the last chosen, and may be partly filled.
        return tokens[:, None, : tokens.shape[1] - -n % self.page]
