"""Index: a column derived from the keys of a segment, which offers scores or candidates.

A reader says which it needs (``Reader.needs``) and asks the segment's by name. The numbers lie in the segment's pool,
a part beside keys and values, so they follow their pages wherever these go: append, drop, crop, copies, interruptions,
and the count of bytes.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kvote.kernels.contract import Backend
from kvote.kernels.lanes import Lanes
from kvote.store.pages import Lane, UncompressedPool


class KeyPages(Protocol):
    """The parts of a segment that an index reads: its ``pool``, the kernels that read it, and where sequences lie."""

    heads: int
    pool: UncompressedPool
    kernels: Backend

    def table(self, rows: Sequence[int]) -> Lanes:
        """Where sequences lie, as kernels read it; a lane per sequence and key head."""
        ...

    def pages(self, rows: Sequence[int]) -> Tensor:
        """Page table of equally long sequences, int64 [b * h, pages]."""
        ...


class Column(Protocol):
    """An index over the keys of one segment."""

    @property
    def nbytes(self) -> int:
        """Bytes besides its part of the pool."""
        ...

    @property
    def coded(self) -> tuple[Tensor, int] | None:
        """The tensor and bits per channel of its codes, if the kernel that stores tokens writes them in the same call;
        else None."""
        ...

    def write(self, lanes: Sequence[Lane], start: int, key: Tensor) -> None:
        """Covers the tokens ``start`` to ``start + t`` of equally long lanes, of which each has the pages alone.

        Their keys ``key`` [b, h, t, d] lie in the pool already, ``lanes`` in their order. Tokens behind those are
        forgotten ones. An entry that covers several tokens may still tell of forgotten ones until the next is written.
        """
        ...


class Index(Protocol):
    """Which column a reader needs. ``required``: it cannot do without. ``whole_layers``: it goes by the place of a head
    among all key heads of its layer."""

    @property
    def name(self) -> str: ...
    @property
    def required(self) -> bool: ...
    @property
    def whole_layers(self) -> bool: ...
    def token_bytes(self, dim: int, dtype: torch.dtype) -> float:
        """Bytes of a token of one key head of ``dim`` channels."""
        ...

    def column(self, keys: KeyPages, layer: int) -> Column | None:
        """The column, with room in the pool but nothing written yet; None where the layer or its kernels have none.

        Raises MethodError for a layer that it does not fit.
        """
        ...
