"""Keys as the model rotated them, whatever form they are held in."""

import torch
from torch import Tensor

from kvote.rope import Rope
from kvote.store.segment import Segment


def rotated_keys(segment: Segment, row: int, start: int, stop: int, rope: Rope | None) -> Tensor:
    """Keys [h, n, d] of tokens ``start`` to ``stop`` at their own positions, in float32. ``rope``: the rotation that
    they are held without; None where it is in them."""
    key = segment.decode([row], start, stop)[0][0].float()
    if rope is None:
        return key
    places = torch.stack([lane[start:stop] for lane in segment.positions(row)]).long()
    return rope.apply(key, rope.once(places))
