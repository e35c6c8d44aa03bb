"""A keeper that drops nothing and shows tests what a keeper is shown."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvote.keep.budget import Budget
from kvote.keep.observation import Observation
from kvote.keep.policies import KeepAll
from kvote.needs import KeeperOffers


@dataclass(frozen=True)
class Watching(KeepAll):
    """``seen``: what it was shown, with the attention received computed at once."""

    seen: list[tuple[Observation, Tensor]] = field(default_factory=list)
    offers = KeeperOffers(equal_layers=True)

    @property
    def budget(self) -> Budget:
        return Budget(10**6)

    def observes(self, prompt_left: int | None) -> bool:
        return True

    def observe(self, seen: Observation, memory: Any) -> None:
        self.seen.append((seen, seen.mass()))

    def total(self, row: int, length: int) -> Tensor:
        """Attention [h, length] received by the tokens of a sequence in all that was shown."""
        heads = self.seen[0][1].shape[1]
        total = torch.zeros(heads, length)
        for seen, mass in self.seen:
            if row in seen.rows:
                total[:, : mass.shape[2]] += mass[seen.rows.index(row)]
        return total


def weights(query: Tensor, key: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Attention [b, heads, t, n] as a matrix, of queries that are the last t of n tokens."""
    t, n = query.shape[2], key.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.double() @ key.double().transpose(-1, -2) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    late = torch.arange(n) > torch.arange(n - t, n)[:, None]
    return logits.masked_fill(late, float("-inf")).softmax(dim=-1)


def received(weights: Tensor, kv_heads: int) -> Tensor:
    """Column sums [b, h, n] of weights [b, heads, t, n] over the query heads of each key head."""
    b, heads, t, n = weights.shape
    return weights.reshape(b, kv_heads, heads // kv_heads * t, n).sum(dim=2).float()
