"""Which tokens stay in memory after a forward pass."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Keeper(Protocol):
    """Decides which tokens of a sequence stay. ``drops``: whether it ever lets one go."""

    @property
    def drops(self) -> bool: ...
    def survivors(self, length: int) -> Tensor | None:
        """Slots to keep out of ``length``, ascending; None keeps all."""
        ...


@dataclass(frozen=True)
class KeepAll:
    """Every token stays."""

    drops: bool = False

    def survivors(self, length: int) -> None:
        return None


@dataclass(frozen=True)
class KeepSinksAndRecent:
    """The first ``sinks`` tokens and the last ``window`` ones."""

    sinks: int
    window: int
    drops: bool = True

    def survivors(self, length: int) -> Tensor | None:
        if length <= self.sinks + self.window:
            return None
        return torch.cat([torch.arange(self.sinks), torch.arange(length - self.window, length)])
