"""The best read bandwidth of this machine, sampled again and again, because on a shared machine it drifts."""

import time
from statistics import median

import torch

from kvote import kernels
from kvote.env import memory

_BYTES = 1 << 29


class Sweep:
    """512 MiB of memory on large pages (less where little is free).

    A reading of it gives the bandwidth, and evicts from the caches what was there: what is timed next has to fetch its
    tokens from memory, as it must in a model whose other layers were read meanwhile.
    """

    def __init__(self) -> None:
        free = memory()[1]
        size = min(_BYTES, free // 8) if free else _BYTES
        self.data = torch.empty(size, dtype=torch.uint8)
        kernels.use_large_pages(self.data)
        self.data.fill_(1)
        self.samples: list[float] = []

    def __call__(self) -> None:
        """Reads it all, and notes how fast that was."""
        begin = time.perf_counter()
        kernels.read_all(self.data)
        self.samples.append(self.data.nbytes / (time.perf_counter() - begin))

    @property
    def bandwidth(self) -> float:
        """Bytes per second, the median of all readings."""
        if not self.samples:
            self()
        return median(self.samples)
