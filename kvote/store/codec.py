"""Codec: how keys and values become codes, as data: the grids that they are rounded to, and the pages these lie in."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvote import kernels
from kvote.kernels.packing import PACKED, Packing
from kvote.store.packed import PackedLanes


@dataclass(frozen=True)
class Codec:
    """Groups of ``group`` numbers share a minimum and a scale, and each number has ``bits``. Groups of keys are
    neighbouring tokens of one channel, unless ``keys_by_token``: then, as those of values always are, neighbouring
    channels of one token."""

    bits: int
    group: int
    keys_by_token: bool = False

    @property
    def run(self) -> int:
        """Tokens whose keys are packed together."""
        return 1 if self.keys_by_token else self.group

    def packings(self, dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Packing, Packing]:
        """The forms of keys of ``dim`` and values of ``value_dim`` channels."""
        keys = Packing(self.bits, self.group, dim, dtype, are_keys=True, by_token=self.keys_by_token)
        return keys, Packing(self.bits, self.group, value_dim, dtype, are_keys=False)

    def lanes(self, heads: int, like: Tensor, value_dim: int) -> tuple[PackedLanes, PackedLanes]:
        """Empty lanes of keys like ``like``, and of their values."""
        backend = kernels.chosen(like, like.new_empty(0, value_dim))
        keys, values = self.packings(like.shape[-1], value_dim, like.dtype)
        return (
            PackedLanes(heads, keys, like.device, backend=backend),
            PackedLanes(heads, values, like.device, backend=backend),
        )

    def token_bytes(self, dim: int, dtype: torch.dtype) -> float:
        """Bytes of a token of one key head, its position not counted."""
        return sum(side.page_bytes for side in self.packings(dim, dim, dtype)) / PACKED
