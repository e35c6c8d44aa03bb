"""Which tokens stay in memory after a forward pass, decided by their place in the text alone."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvote.keep.budget import Budget
from kvote.keep.keeper import Held
from kvote.keep.observation import Observation


class _Blind:
    """What keepers have in common that look at no attention."""

    per_head = False
    adds_up = False
    waits = False
    token_bytes = 0

    def new_memory(self) -> None:
        return None

    def observes(self, ahead: int | None) -> bool:
        return False

    def observe(self, seen: Observation, memory: None) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class KeepAll(_Blind):
    """Every token stays."""

    drops: bool = False

    @property
    def budget(self) -> None:
        return None

    def survivors(self, held: Held, memory: None) -> None:
        return None


@dataclass(frozen=True)
class KeepSinksAndRecent(_Blind):
    """The first ``sinks`` tokens and the last ``window`` ones."""

    sinks: int
    window: int
    drops: bool = True

    @property
    def budget(self) -> Budget:
        return Budget(self.sinks + self.window)

    def survivors(self, held: Held, memory: None) -> Tensor | None:
        if held.length <= self.sinks + self.window:
            return None
        return torch.cat([torch.arange(self.sinks), torch.arange(held.length - self.window, held.length)])
