"""Region: tokens of the sequences of a layer in one encoded form. A ``Sequence`` holds a list of them; what it takes to
split a token set over them, merge their answers, drop, cut and copy is written there, once."""

from typing import Protocol

import torch
from torch import Tensor

from kvote.kernels.contract import Answer, Recent
from kvote.rope import Angles
from kvote.store.pages import PagePool
from kvote.store.segment import Scaling

# Tokens by their slots: a range that all sequences share, or lists that ascend.
Slots = range | Tensor


class Region(Protocol):
    """Some tokens of each sequence, which stand side by side.

    ``rows``: sequences that hold equally many tokens here. ``slots`` count from the region's first token: a range, or
    int64 [b, m]; for ``decode`` also [b, heads, m], a list for each of as many query heads. ``lists``: whether
    ``attend`` answers lists with less work than ``decode``.
    """

    @property
    def lists(self) -> bool: ...
    @property
    def pools(self) -> list[PagePool]:
        """The pages that hold it, if any do."""
        ...

    @property
    def nbytes(self) -> int: ...
    def add_sequences(self, count: int) -> None: ...
    def length(self, row: int) -> int: ...
    def alone(self, row: int) -> int:
        """How many of its tokens lie nowhere else: those after them, and all later ones, lie in the uncompressed pages
        too. Of all regions but the last, ``length``."""
        ...

    def positions(self, row: int) -> Tensor:
        """Original positions of the tokens that lie nowhere else, int32 [h, alone]; [1, alone] where all key heads hold
        the same tokens, in the regions that follow too."""
        ...

    def attend(
        self, query: Tensor, rows: list[int], slots: Slots, angles: Angles | None, scaling: Scaling
    ) -> Answer | None:
        """What queries [b, heads, t, d], which all see all of ``slots``, read there: [b, heads, t, dv] and log-sum-exp
        [b, heads, t]; None where the tokens had better be decoded first.

        ``angles`` [m, r], [b, 1, m, r] or [b, h, m, r]: where keys are to stand that are held at position 0.
        """
        ...

    def attend_with(
        self, query: Tensor, rows: list[int], slots: range, recent: Recent, scaling: Scaling
    ) -> Answer | None:
        """The same for a query [b, heads, 1, d] which sees some ``recent`` uncompressed tokens as well; keys are not
        turned."""
        ...

    def scores(self, query: Tensor, rows: list[int], slots: range) -> Tensor:
        """q.k [b, r, heads, m] of ``query`` [b, heads, r, d] with keys as they are held, in float32."""
        ...

    def decode(self, rows: list[int], slots: Slots, room: int = 0) -> tuple[Tensor, Tensor]:
        """Keys [b, h, m + room, d] and values [b, h, m + room, dv]; where query heads have lists of their own, h is as
        many. What lies in the last ``room`` is undefined."""
        ...

    def holds(self, row: int, slots: Slots, merged: bool) -> tuple[int, int]:
        """How many tokens the region can still hold once only ``slots`` stay, and how many of those alone. They are the
        first so many of ``slots``, of every key head. What is not among them is decoded, and may be encoded anew.

        ``slots``: a range from 0, or int64 [1 or h, m]; what lies behind the region is named, too. ``merged``: whether
        the content changes.
        """
        ...

    def keep(self, row: int, slots: Slots, content: tuple[Tensor, Tensor] | None) -> None:
        """Makes it so. ``slots`` as before; ``content``: new keys [h, count, d] and values of those that it holds."""
        ...

    def select(self, index: list[int]) -> None:
        """Makes sequence i a copy of the former sequence ``index[i]``."""
        ...


class PlainRegion:
    """What a region is unless it says otherwise: its tokens are decoded before they are read, and lie in no pages."""

    @property
    def lists(self) -> bool:
        return False

    @property
    def pools(self) -> list[PagePool]:
        return []

    def attend(
        self, query: Tensor, rows: list[int], slots: Slots, angles: Angles | None, scaling: Scaling
    ) -> Answer | None:
        return None

    def attend_with(
        self, query: Tensor, rows: list[int], slots: range, recent: Recent, scaling: Scaling
    ) -> Answer | None:
        return None


def unmoved(slots: Slots) -> int:
    """How many tokens stay where they are, from the first on."""
    if isinstance(slots, range):
        return len(slots)
    moving = (slots != torch.arange(slots.shape[1], device=slots.device)).any(dim=0)
    return int(moving.int().argmax()) if bool(moving.any()) else slots.shape[1]


def differ(slots: Slots) -> bool:
    """Whether ``slots`` [1 or h, m] name other tokens in one key head than in another."""
    return isinstance(slots, Tensor) and not bool((slots == slots[:1]).all())
