"""Prepacked: prompts of a batch, one behind the other in few rows, as a model computes them without padding."""

from dataclasses import dataclass

import torch
from torch import Tensor


def bins_of(lengths: list[int]) -> list[list[int]]:
    """Which prompts share a row: as few rows as first fit decreasing makes, none longer than the longest prompt.

    Prompts are named by their place in ``lengths``; those without tokens are in no row.
    """
    capacity, bins, room = max(lengths, default=0), list[list[int]](), list[int]()
    for prompt in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        n = lengths[prompt]
        if n == 0:
            continue
        fitting = next((at for at, left in enumerate(room) if left >= n), None)
        if fitting is None:
            bins.append([])
            room.append(capacity)
            fitting = len(room) - 1
        bins[fitting].append(prompt)
        room[fitting] -= n
    return bins


@dataclass(frozen=True)
class Prepacked:
    """Where the tokens of a padded batch [rows, columns] lie in packed rows [bins, width].

    ``valid`` bool [rows, columns]: which columns are tokens; ``positions`` [rows, columns]: theirs in their own prompt;
    ``places`` [rows, columns]: where they lie among the bins * width packed ones, 0 for padding.
    """

    valid: Tensor
    positions: Tensor
    places: Tensor
    bins: int
    width: int

    @classmethod
    def of(cls, valid: Tensor) -> "Prepacked":
        """Lays the tokens of a batch, which ``valid`` [rows, columns] tells from padding, into few rows."""
        lengths: list[int] = valid.sum(dim=1).tolist()
        bins = bins_of(lengths)
        width = max((sum(lengths[prompt] for prompt in each) for each in bins), default=0)
        places = torch.zeros(valid.shape, dtype=torch.int64, device=valid.device)
        for row, prompts in enumerate(bins):
            start = row * width
            for prompt in prompts:
                stop = start + lengths[prompt]
                places[prompt, valid[prompt]] = torch.arange(start, stop, device=valid.device)
                start = stop
        return cls(valid, (valid.cumsum(dim=1) - 1).clamp(min=0), places, len(bins), width)

    def pack(self, x: Tensor) -> Tensor:
        """From [rows, columns, ...] to [bins, width, ...], zeros behind the last prompt of a row."""
        packed = x.new_zeros(self.bins * self.width, *x.shape[2:])
        packed[self.places[self.valid]] = x[self.valid]
        return packed.view(self.bins, self.width, *x.shape[2:])

    def unpack(self, x: Tensor) -> Tensor:
        """From [bins, heads, width, d] to [rows, heads, columns, d]; what stands for padding is some token's."""
        return x.transpose(1, 2).flatten(0, 1)[self.places].transpose(1, 2)
