"""Counts of the tokens that generated tokens have read, for people to look at."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote.read.reader import Reading
from kvote.tokens import Span


@dataclass
class ReadCounts:
    """How often the tokens of each sequence were read, by original position; ``queries``: of how many queries, those of
    each layer by themselves."""

    counts: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, int] = field(default_factory=dict)

    def add(self, reading: Reading, span: Span) -> None:
        """Counts what the single query of ``span`` reads, in equal parts for each key head."""
        for i, row in enumerate(reading.rows):
            positions = reading.segment.positions(row)
            size = 1 + max(int(at.max()) for at in positions)
            counts = self.counts.get(row, torch.zeros(0))
            if len(counts) < size:
                counts = torch.cat([counts, torch.zeros(2 * size - len(counts))])
            for read in span.reads:
                for head, at in enumerate(positions):
                    held = at.long().cpu()
                    if isinstance(read.index, range):
                        counts.index_add_(0, held[read.index.start : read.index.stop], _part(len(read), len(positions)))
                        continue
                    lists = read.index[i].reshape(-1, read.index.shape[-1]).cpu()
                    if read.by_head:
                        each = len(lists) // len(positions)
                        lists = lists[head * each : (head + 1) * each]
                    slots = lists.flatten()
                    counts.index_add_(0, held[slots], _part(len(slots), len(positions) * len(lists)))
            self.counts[row] = counts
            self.queries[row] = self.queries.get(row, 0) + 1

    def shares(self, row: int, tokens: int) -> Tensor:
        """Which share of the queries has read each of the first ``tokens`` positions: float32 [tokens]."""
        shares = torch.zeros(tokens)
        counts = self.counts.get(row, shares)[:tokens]
        shares[: len(counts)] = counts / max(1, self.queries.get(row, 0))
        return shares


def _part(count: int, of: int) -> Tensor:
    return torch.full((count,), 1 / of)
