"""Codec: how keys and values become codes, as data: a transform, the grids that what it gives is rounded to, and the
pages these lie in."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvote import kernels
from kvote.kernels.packing import PACKED, Packing
from kvote.store.packed import PackedLanes
from kvote.store.transform import Rotation


@dataclass(frozen=True)
class Codec:
    """Groups of ``group`` numbers share a minimum and a scale, and each number has ``bits``. Groups of keys are
    neighbouring tokens of one channel, unless ``keys_by_token``: then, as those of values always are, neighbouring
    channels of one token.

    ``clip``: as ``Packing`` has it. ``turns_keys`` and ``turns_values``: how they are transformed before they are
    rounded; that is undone when they are decoded.
    """

    bits: int
    group: int
    keys_by_token: bool = False
    clip: float | None = None
    turns_keys: Rotation | None = None
    turns_values: Rotation | None = None

    @property
    def run(self) -> int:
        """Tokens whose keys are packed together."""
        return 1 if self.keys_by_token else self.group

    def packings(self, dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Packing, Packing]:
        """The forms of keys of ``dim`` and values of ``value_dim`` channels."""
        form = self.bits, self.group
        keys = Packing(*form, dim, dtype, are_keys=True, by_token=self.keys_by_token, clip=self.clip)
        return keys, Packing(*form, value_dim, dtype, are_keys=False, clip=self.clip)

    def lanes(self, heads: int, like: Tensor, value_dim: int) -> tuple[PackedLanes, PackedLanes]:
        """Empty lanes of keys like ``like``, and of their values. Raises ValueError for a transform of another form."""
        backend = kernels.chosen(like, like.new_empty(0, value_dim))
        sides = zip(
            self.packings(like.shape[-1], value_dim, like.dtype), (self.turns_keys, self.turns_values), strict=True
        )
        keys, values = (
            PackedLanes(
                heads,
                form,
                like.device,
                backend=backend,
                transform=None if turns is None else turns.of(heads, form.dim, like.device),
            )
            for form, turns in sides
        )
        return keys, values

    def token_bytes(self, dim: int, dtype: torch.dtype) -> float:
        """Bytes of a token of one key head, its position not counted."""
        return sum(side.page_bytes for side in self.packings(dim, dim, dtype)) / PACKED
