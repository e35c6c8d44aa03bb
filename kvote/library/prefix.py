"""Prefix: tokens that have been read, and what they are worth."""

import hashlib
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvote.cache import Cache


@dataclass(eq=False)
class Prefix:
    """``ids`` [n] int64 on the CPU, and the ``cache`` that has read them, which only ever is forked. ``seconds``: what
    reading them takes; ``used``: when that was last spared or done, in seconds of a clock; ``kept``: whether it is on
    disk."""

    scope: str
    ids: Tensor
    cache: Cache
    model: "weakref.ref[Any]"
    seconds: float
    used: float
    kept: bool = False

    @property
    def name(self) -> str:
        return name_of(self.scope, self.ids)


def name_of(scope: str, ids: Tensor) -> str:
    """The name of a prefix: digests of how it was read, and of its tokens."""
    return f"{scope[:32]}-{hashlib.sha256(ids.numpy().tobytes()).hexdigest()}"


def shared(one: Tensor, other: Tensor) -> int:
    """How many tokens two texts [n] begin with alike."""
    n = min(len(one), len(other))
    differ = torch.ne(one[:n], other[:n]).nonzero()
    return int(differ[0]) if len(differ) else n


def worth(seconds: float, nbytes: int, idle: float) -> float:
    """What holding a byte spares, were the prefix asked for as often as it has been of late: seconds to make it again,
    per byte and second since its last use (as in hyperbolic caching, Blankstein et al., ATC 2017)."""
    return seconds / max(1, nbytes) / max(idle, 1e-3)
