"""Merging: tokens that look alike become one, the key of which keeps its length."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Float32 similarities (16 MiB) that are held at a time.
_SIMILAR_HELD = 1 << 22
# Similarities that differ by less count as equal: a word that comes again differs from itself by rounding alone.
_EQUAL = 2.0**-16


@dataclass(frozen=True)
class Tokens:
    """Keys [h, n, d], values [h, n, dv] and importance [h, n] of some tokens."""

    key: Tensor
    value: Tensor
    score: Tensor

    def take(self, slots: Tensor) -> "Tokens":
        """The tokens at ``slots`` [h, m]."""
        key, value = (x.gather(1, slots[..., None].expand(-1, -1, x.shape[2])) for x in (self.key, self.value))
        return Tokens(key, value, self.score.gather(1, slots))

    def float(self) -> "Tokens":
        return Tokens(self.key.float(), self.value.float(), self.score.float())


def assign(centres: Tokens, others: Tokens, threshold: float) -> Tensor:
    """The centre [h, n] that each other token is merged into, or -1 for none.

    A token goes to the centre with which its redundancy, the cosine of the keys times that of the values, is largest,
    unless that is below ``threshold`` (above 0). Two negative cosines are no likeness. Of
    equally similar centres, the first takes the token.
    """
    centre_key, centre_value = normalize(centres.key, dim=-1), normalize(centres.value, dim=-1)
    h, n, _ = others.key.shape
    step = max(1, _SIMILAR_HELD // max(1, h * centres.key.shape[1]))
    parts = [others.score.new_empty(h, 0, dtype=torch.int64)]
    for start in range(0, n, step):
        key, value = (normalize(x[:, start : start + step], dim=-1) for x in (others.key, others.value))
        alike = (key @ centre_key.mT).clamp_min_(0) * (value @ centre_value.mT)
        most = alike.div_(_EQUAL).round_().mul_(_EQUAL).max(dim=-1)
        parts.append(most.indices.where(most.values >= threshold, -1))
    return torch.cat(parts, dim=1)


def merged(centres: Tokens, others: Tokens, into: Tensor) -> Tokens:
    """The centres once each other token has been merged into centre ``into`` [h, n], or into none where that is -1.

    Values are averaged, weighted by importance; so are the directions of keys and, apart from them, their lengths.
    The importance of a centre becomes that of its whole class. A centre that nothing was merged into stays as it is.
    """
    here = into >= 0
    place = into.clamp_min(0)
    # Importance may be 0 all over; a class then shares equally.
    weight, own = ((x.score.clamp_min(1e-20)) for x in (others, centres))
    weight = weight * here
    total = own.scatter_add(1, place, weight)
    share = weight / total.gather(1, place)

    def mean(centre: Tensor, other: Tensor) -> Tensor:
        """Weighted mean [h, m, c], as what is added to the centre: equal tokens add nothing."""
        at = place[..., None].expand(-1, -1, other.shape[2])
        return centre.scatter_add(1, at, (other - centre.gather(1, at)) * share[..., None])

    length, other_length = centres.key.norm(dim=-1, keepdim=True), others.key.norm(dim=-1, keepdim=True)
    direction = mean(normalize(centres.key, dim=-1), normalize(others.key, dim=-1))
    key = normalize(direction, dim=-1) * mean(length, other_length)
    grown = torch.zeros_like(centres.score).scatter_add(1, place, here.float()) > 0
    score = centres.score.scatter_add(1, place, others.score * here)
    return Tokens(key.where(grown[..., None], centres.key), mean(centres.value, others.value), score)
