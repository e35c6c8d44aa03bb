"""Part of a budget is for representatives of what would go: tokens that key heads judge unlike one another."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvote import kernels
from kvote.errors import MethodError
from kvote.keep.budget import whole
from kvote.numbers import check_whole, is_number

ANCHORS = ("random", "zeros", "ones", "alternating")


@dataclass(frozen=True)
class Representatives:
    """Besides the best tokens of a key head, the share ``crush`` of what it keeps are others, evenly spaced in the
    order of the Hamming distance of their signatures to an ``anchor``. ``seed``: of a 'random' one."""

    crush: float
    anchor: str
    seed: int

    def __post_init__(self) -> None:
        check_whole(self, seed=0)
        if not is_number(self.crush) or not 0 <= self.crush <= 1:
            raise MethodError(f"crush must be a share from 0 to 1; got {self.crush!r}.")
        if self.anchor not in ANCHORS:
            raise MethodError(f"anchor must be one of {', '.join(ANCHORS)}; got {self.anchor!r}.")

    def chosen(self, worth: Tensor, count: int) -> Tensor:
        """Which ``count`` of n tokens stay in each key head, [h, count], ascending, by their ``worth`` [h, n]."""
        spread = whole(count * self.crush)
        best = kernels.top_k(worth, count - spread) if count > spread else worth.new_empty(len(worth), 0).long()
        if not spread:
            return best
        far = distance(signatures(worth), anchor(self.anchor, len(worth), self.seed).to(worth.device))
        # What stays anyway comes last in the order, where nothing is picked.
        order = far.expand(len(worth), -1).scatter(1, best, len(worth) + 1).argsort(dim=1, stable=True)
        rest = worth.shape[1] - best.shape[1]
        ranks = torch.arange(spread, device=worth.device) * rest // spread
        return torch.cat([best, order[:, ranks]], dim=1).sort(dim=1).values


def signatures(worth: Tensor) -> Tensor:
    """Bool [h, n]: which half of the tokens (rounded down) each key head ranks highest, of equal ones the first."""
    order = worth.argsort(dim=1, descending=True, stable=True)[:, : worth.shape[1] // 2]
    return torch.zeros_like(worth, dtype=torch.bool).scatter_(1, order, True)


def anchor(mode: str, heads: int, seed: int) -> Tensor:
    """Bool [heads]: what signatures are compared with."""
    if mode == "random":
        return torch.randint(2, (heads,), generator=torch.Generator().manual_seed(seed)).bool()
    every = {"zeros": [False, False], "ones": [True, True], "alternating": [False, True]}[mode]
    return torch.tensor([every[head % 2] for head in range(heads)])


def distance(bits: Tensor, anchor: Tensor) -> Tensor:
    """In how many of h bits each of n signatures [h, n] differs from the ``anchor`` [h]."""
    return (bits ^ anchor[:, None]).sum(dim=0)
