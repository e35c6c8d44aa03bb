"""Which tokens are salient: normalised attention of some probe queries (ZipCache, He et al. 2024, arXiv 2405.14256)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvote.store.segment import Scaling

# Attention weights that exist at a time.
_WEIGHTS = 1 << 24
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Probes:
    """Queries [heads, p, d] of tokens of one sequence that are not encoded yet, the slots and the original positions of
    these tokens, int64 [p]; ``ended``: whether a prompt has ended among them."""

    query: Tensor
    slots: Tensor
    places: Tensor
    ended: bool = False

    def only(self, which: Tensor) -> "Probes":
        """Those that ``which`` [p] marks."""
        return Probes(self.query[:, which], self.slots[which], self.places[which], self.ended)

    def and_of(self, later: "Probes") -> "Probes":
        query = torch.cat([self.query, later.query], dim=1)
        slots, places = torch.cat([self.slots, later.slots]), torch.cat([self.places, later.places])
        return Probes(query, slots, places, self.ended or later.ended)


def drawn(positions: Tensor, share: float, seed: int) -> Tensor:
    """Which tokens at ``positions`` int64 are drawn by lot, a ``share`` of them; the same whenever they are asked."""
    # The finaliser of MurmurHash3, in the low 32 bits.
    x = (positions + (seed * 0x9E3779B1 & _WORD)) & _WORD
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _WORD
    return (x ^ (x >> 16)) < share * 2**32


def saliency(probes: Probes, key: Tensor, start: int, scaling: Scaling) -> Tensor:
    """Normalised attention float32 [h, n - start] that tokens from ``start`` on receive, of all keys [h, n, d]: what
    probes pay, over how many of them can see the token. Query heads that share a key head add up."""
    h, n, d = key.shape
    query, last = probes.query.float(), probes.slots
    groups = len(query) // h
    total = torch.zeros(h, n - start, device=key.device)
    place, transposed = torch.arange(n, device=key.device), key.float().transpose(1, 2)
    rows = max(1, _WEIGHTS // (len(query) * n))
    for i in range(0, len(last), rows):
        some = query[:, i : i + rows].reshape(h, -1, d) @ transposed * scaling.scale
        if scaling.softcap is not None:
            some = scaling.softcap * torch.tanh(some / scaling.softcap)
        hidden = place > last[i : i + rows, None]
        weights = some.view(h, groups, -1, n).masked_fill(hidden, float("-inf")).softmax(-1)
        total += weights[..., start:].sum((1, 2))
    seen = (last[:, None] >= place[start:]).sum(0)
    return total / seen.clamp(min=1)


def chosen(scores: Tensor, share: float) -> Tensor:
    """Which tokens are salient, bool [h, n]: all but the floor((1 - share) * n) with the lowest scores [h, n] of their
    key head."""
    others = scores.argsort(dim=1, stable=True)[:, : int((1 - share) * scores.shape[1] + 1e-9)]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, others, False)
