"""Lanes: where tokens lie in a pool of pages, as all kernels are told it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

PAGE = 64


class Lanes:
    """The runs (first page, pages) of neighbouring pages of some lanes in a pool, in token order.

    Whoever owns the pool holds it for as long as the pages do not change hands. ``address``: of the runs int64
    [runs, 2], of where each lane's begin int64 [count + 1], and how many lanes there are.
    """

    __slots__ = ("address", "begins", "count", "runs", "tables")

    def __init__(self, runs: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.count = len(runs)
        self.runs = np.array([run for lane in runs for run in lane], np.int64).reshape(-1, 2)
        self.begins = np.cumsum([0, *(len(lane) for lane in runs)], dtype=np.int64)
        self.address = (self.runs.ctypes.data, self.begins.ctypes.data, self.count)
        # Page tables on a device [lanes, pages], for kernels that read those.
        self.tables: dict[torch.device, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Lanes:
        # Never changed once made, and a copy's addresses would be those of the original's arrays.
        return self

    def part(self, first: int, count: int) -> tuple[int, int, int]:
        """The ``address`` of lanes ``first`` to ``first + count`` alone."""
        runs, begins, _ = self.address
        return runs, begins + first * self.begins.itemsize, count

    def only(self, lane: int, count: int = 1) -> Lanes:
        """That lane alone, or so many from it on."""
        edges = self.begins[lane : lane + count + 1].tolist()
        return Lanes([[(first, n) for first, n in self.runs[a:b].tolist()] for a, b in pairwise(edges)])

    def pages(self) -> list[np.ndarray]:
        """The pages of each lane in token order, int64."""
        lanes = np.split(self.runs, self.begins[1:-1])
        none = np.empty(0, np.int64)
        return [np.concatenate([np.arange(first, first + n) for first, n in lane.tolist()] or [none]) for lane in lanes]
