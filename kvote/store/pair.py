"""What two layers hold together of one sequence: of each token one direction, and its size in either layer.

Tokens whose directions are far apart are retained: both layers have them as they were.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote.store.bodies import head_of
from kvote.store.region import Slots

# Tokens of which float32 numbers exist at a time.
_BLOCK = 2048
# Below this sine of the angle, both directions are interpolated in a straight line.
_STRAIGHT = 1e-4


@dataclass(frozen=True)
class Side:
    """Keys, or values, of n tokens in both layers of a pair: their ``direction`` [h, n, d], each layer's ``sizes``
    float32 [h, n], and each layer's ``retained`` [r, d], which stand at ``places`` int64 [r] (head times n plus slot,
    ascending)."""

    direction: Tensor
    sizes: tuple[Tensor, Tensor]
    places: Tensor
    retained: tuple[Tensor, Tensor]

    def read(self, layer: int, slots: Slots) -> Tensor:
        """What ``layer`` (0 or 1) has in ``slots``, [h, m, d] or [lists, m, d]."""
        h, n, _ = self.direction.shape
        if isinstance(slots, range):
            own = torch.arange(slots.start, slots.stop, device=self.direction.device).expand(h, -1)
            direction, size = (x[:, slots.start : slots.stop] for x in (self.direction, self.sizes[layer]))
            at = torch.arange(h, device=own.device)[:, None] * n + own
        else:
            own = slots if slots.dim() == 2 else slots.expand(h, -1)
            heads = head_of(own, h)
            direction, size, at = self.direction[heads, own], self.sizes[layer][heads, own], heads * n + own
        made = (direction * size[..., None]).to(direction.dtype)
        if len(self.places):
            found = torch.searchsorted(self.places, at).clamp(max=len(self.places) - 1)
            made = torch.where((self.places[found] == at)[..., None], self.retained[layer][found], made)
        return made

    def of(self, slots: Tensor) -> "Side":
        """The same for ``slots`` [m] only."""
        n, m = self.direction.shape[1], len(slots)
        place = torch.full((n,), -1, dtype=torch.int64, device=slots.device)
        place[slots] = torch.arange(m, device=slots.device)
        now = place[self.places % n]
        stays = now >= 0
        one, other = self.sizes
        return Side(
            self.direction[:, slots],
            (one[:, slots], other[:, slots]),
            (self.places // n * m + now)[stays],
            (self.retained[0][stays], self.retained[1][stays]),
        )


@dataclass
class Pair:
    """What two layers hold of one sequence together, and the original ``positions`` int32 [n]."""

    key: Side
    value: Side
    positions: Tensor
    _last: "tuple[Tensor, Pair] | None" = field(default=None, repr=False)

    def of(self, slots: Tensor) -> "Pair":
        """The same for ``slots`` [m] only; one object for both layers that ask for the same."""
        if self._last is None or not torch.equal(self._last[0], slots):
            self._last = slots, Pair(self.key.of(slots), self.value.of(slots), self.positions[slots])
        return self._last[1]


def slerp(one: Tensor, other: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit vectors at ``t`` of the way from the direction of ``one`` to that of ``other`` [..., d], on the sphere; the
    angle between the two, and the sizes of both [...]; in float32."""
    one, other = one.float(), other.float()
    sizes = [x.norm(dim=-1) for x in (one, other)]
    tiny = torch.finfo(torch.float32).tiny
    u, v = (x / size.clamp(min=tiny)[..., None] for x, size in zip((one, other), sizes, strict=True))
    # As arccos(u.v), but exact for small angles, too, and never NaN.
    angle = 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))
    sine = angle.sin()
    straight = sine < _STRAIGHT
    sine = torch.where(straight, 1.0, sine)
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    second = torch.where(straight, t, (t * angle).sin() / sine)
    made = first[..., None] * u + second[..., None] * v
    return made / made.norm(dim=-1, keepdim=True).clamp(min=tiny), angle, sizes[0], sizes[1]


def apart(angle: Tensor, gamma: float) -> Tensor:
    """Which tokens are retained, bool [h, n]: those in the farthest ``gamma`` of the range of their head's angles
    [h, n]."""
    low, high = angle.amin(dim=1, keepdim=True), angle.amax(dim=1, keepdim=True)
    return (angle > high - gamma * (high - low)) & (high > low)


def merged(one: Tensor, other: Tensor, t: float, gamma: float) -> Side:
    """Keys, or values, of two layers [h, n, d] merged at ``t`` of the way from the first to the second."""
    starts = range(0, one.shape[1], _BLOCK)
    each = [slerp(one[:, at : at + _BLOCK], other[:, at : at + _BLOCK], t) for at in starts]
    angle, first, second = (torch.cat([made[i] for made in each], dim=1) for i in (1, 2, 3))
    direction = torch.cat([made[0].to(one.dtype) for made in each], dim=1)
    places = apart(angle, gamma).flatten().nonzero()[:, 0]
    retained = (one.flatten(0, 1)[places], other.flatten(0, 1)[places])
    return Side(direction, (first, second), places, retained)
