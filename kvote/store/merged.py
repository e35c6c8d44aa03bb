"""Layers merged in pairs: what both layers of a pair hold of a prompt once the second has it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvote.errors import MethodError
from kvote.needs import Keys, Needs, StoreOffers
from kvote.numbers import is_number
from kvote.rope import Rope
from kvote.store.bodies import PlainBody
from kvote.store.pair import Pair, merged
from kvote.store.prompt import PromptSegment
from kvote.store.region import Slots
from kvote.store.segment import Segment
from kvote.store.uncompressed_tokens import token_bytes


@dataclass(frozen=True)
class MergedBody(PlainBody):
    """Tokens of one sequence in the first (``layer`` 0) or second (1) layer of a ``pair``."""

    pair: Pair
    layer: int

    @property
    def positions(self) -> Tensor:
        return self.pair.positions[None]

    @property
    def tensors(self) -> list[Tensor]:
        sides, i = (self.pair.key, self.pair.value), self.layer
        shared = [x for side in sides for x in (side.direction, side.places)] if i == 0 else []
        own = [x for side in sides for x in (side.sizes[i], side.retained[i])]
        return [*own, *shared, *([self.pair.positions] if i == 0 else [])]

    def read(self, slots: Slots) -> tuple[Tensor, Tensor]:
        return self.pair.key.read(self.layer, slots), self.pair.value.read(self.layer, slots)

    def keep(self, slots: Tensor, content: tuple[Tensor, Tensor] | None = None) -> "MergedBody":
        if content is not None:
            raise MethodError(
                "Tokens that layers share cannot be merged with others; use a method that only drops some."
            )
        return MergedBody(self.pair.of(slots[0]), self.layer)


@dataclass(frozen=True)
class MergedPairs:
    """When a prompt has gone through the second layer of a pair, both hold it merged; parameters as in
    ``methods/minicache.py``."""

    start: float
    t: float
    gamma: float
    needs = Needs(keys=Keys.ANY, equal_heads=True, equal_layers=True, whole_layers=True)
    offers = StoreOffers(shares_layers=True)
    # Layers that are encoded together.
    layers_per_basis = 2

    def token_bytes(self, heads: int, dim: int, dtype: torch.dtype) -> float:
        """The mean over layers; of retained tokens nothing is known before."""
        merged = dim * dtype.itemsize + 2 * 4 + 4 / (2 * heads)
        return self.start * token_bytes(dim, dim, dtype) + (1 - self.start) * merged

    def __post_init__(self) -> None:
        for name in ("start", "t", "gamma"):
            share = getattr(self, name)
            if not is_number(share) or not 0 <= share <= 1:
                raise MethodError(f"{name} must be a number from 0 to 1; got {share!r}.")

    def new_segment(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None) -> PromptSegment:
        return PromptSegment(heads, like, value_dim, rope)

    def after_layer(self, segments: Sequence[Segment | None], index: int, prompt_left: int) -> bool:
        first = int(self.start * len(segments))
        if index <= first or (index - first) % 2 == 0:
            return False
        one, other = segments[index - 1], segments[index]
        assert isinstance(one, PromptSegment)
        assert isinstance(other, PromptSegment)
        encoded = False
        for row in range(one.sequences):
            n = other.prompt(row, prompt_left)
            if n is None:
                continue
            pair = self.encode(one, other, row, n)
            for layer, segment in enumerate((one, other)):
                segment.put(row, None if pair is None else MergedBody(pair, layer))
            encoded |= pair is not None
        return encoded

    def encode(self, one: PromptSegment, other: PromptSegment, row: int, n: int) -> Pair | None:
        """The first ``n`` tokens of a sequence in two layers; None if these are not alike in shape."""
        held = [segment.uncompressed.decode([row], 0, n) for segment in (one, other)]
        if n == 0 or any(a.shape != b.shape for a, b in zip(*held, strict=True)):
            return None
        key, value = (merged(a[0], b[0], self.t, self.gamma) for a, b in zip(*held, strict=True))
        return Pair(key, value, one.positions(row)[0][:n].clone())
