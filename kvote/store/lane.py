"""A lane: which pages of a pool hold the tokens of one key head of one sequence, in their order."""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

NO_PAGES = np.empty(0, np.int64)


@dataclass
class Lane:
    """Runs of pages ``(first page, pages)`` in token order, and the number of tokens in them."""

    runs: list[tuple[int, int]] = field(default_factory=list)
    length: int = 0

    @property
    def pages(self) -> int:
        if len(self.runs) == 1:
            return self.runs[0][1]
        return sum(count for _, count in self.runs)

    def page_ids(self) -> np.ndarray:
        """Pages in token order, int64 [pages]."""
        return np.concatenate([np.arange(f, f + c) for f, c in self.runs]) if self.runs else NO_PAGES

    def extend(self, first: int, count: int) -> None:
        if self.runs and sum(self.runs[-1]) == first:
            self.runs[-1] = (self.runs[-1][0], self.runs[-1][1] + count)
        else:
            self.runs.append((first, count))


def stretches(old: np.ndarray, new: np.ndarray) -> list[tuple[int, int, int]]:
    """Cuts two index lists where either stops being consecutive: [(old start, new start, count), ...]."""
    if len(old) == 0:
        return []
    breaks = np.flatnonzero((np.diff(old) != 1) | (np.diff(new) != 1)) + 1
    edges = np.concatenate([[0], breaks, [len(old)]])
    return [(int(old[a]), int(new[a]), int(b - a)) for a, b in pairwise(edges)]
