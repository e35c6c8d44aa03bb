"""A baseline for selections: the same number of tokens, drawn at random."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvote.errors import MethodError
from kvote.needs import ReaderOffers
from kvote.read.head_votes import HeadVotes
from kvote.read.reader import Reading


@dataclass(frozen=True)
class RandomTokens(HeadVotes):
    """Reads what HeadVotes reads, with the winners drawn at random: one draw per layer and selecting position."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.seed, int):
            raise MethodError(f"seed must be a whole number; got {self.seed!r}.")

    @property
    def offers(self) -> ReaderOffers:
        # Lots are drawn for a whole pass.
        return ReaderOffers()

    @property
    def _fused(self) -> bool:
        return False

    def _votes(self, reading: Reading, query: Tensor, edges: list[int]) -> Tensor:
        draws = []
        for edge in edges:
            generator = torch.Generator().manual_seed(hash((self.seed, reading.layer, edge)) & (2**63 - 1))
            lots = torch.rand(edges[-1] - self.sinks, generator=generator)
            lots[edge - self.sinks :] = -1.0
            draws.append(lots)
        return torch.stack(draws).to(query.device).expand(query.shape[0], -1, -1)
