"""Keeper: decides which tokens stay. What it may look at, and what it may remember."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from kvote.keep.budget import Budget
from kvote.keep.observation import Observation


@dataclass(frozen=True)
class Held:
    """One sequence when something may be dropped: its ``row``, the tokens it holds, and how many its budget allows."""

    row: int
    length: int
    budget: int


class Remembered(Protocol):
    """What a keeper remembers of what it has observed, per sequence; follows the tokens that it is about."""

    def select(self, index: list[int]) -> None:
        """Sequence i is now a copy of the former sequence ``index[i]``."""
        ...

    def keep(self, row: int, slots: Tensor) -> None:
        """Of a sequence only ``slots`` are left, [m] or [h, m]."""
        ...

    def truncate(self, row: int, length: int) -> None:
        """Of a sequence only the first ``length`` tokens are left."""
        ...

    @property
    def nbytes(self) -> int: ...


class Keeper(Protocol):
    """Decides which tokens of a sequence stay after a pass, all its key heads equally many.

    ``budget``: how many at most, None for no limit. ``drops``: whether it ever lets one go; ``waits``: not before the
    end of an announced prompt. ``per_head``: whether key heads may keep different tokens. ``adds_up``: whether what it
    has observed cannot be taken back, so that a rollback must have been announced even where nothing was dropped.
    ``token_bytes``: what it remembers for good, in bytes per token and key head.
    """

    @property
    def budget(self) -> Budget | None: ...
    @property
    def drops(self) -> bool: ...
    @property
    def waits(self) -> bool: ...
    @property
    def per_head(self) -> bool: ...
    @property
    def adds_up(self) -> bool: ...
    @property
    def token_bytes(self) -> int: ...

    def new_memory(self) -> Any:
        """What it remembers (``Remembered``), or None."""
        ...

    def observes(self, ahead: int | None) -> bool:
        """Whether it wants to see a pass; ``ahead`` as in ``Observation``."""
        ...

    def observe(self, seen: Observation, memory: Any) -> None: ...

    def survivors(self, held: Held, memory: Any) -> Tensor | None:
        """Slots to keep, ascending, [m] for all key heads or [h, m]; None keeps all."""
        ...
