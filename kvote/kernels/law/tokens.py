"""Rows of tokens written to pages, fetched from them, and rotated."""

import torch
from torch import Tensor

from kvote.kernels import checks, reference
from kvote.kernels.contract import Angles
from kvote.kernels.lanes import Lanes
from kvote.kernels.law.pages import behind, listed


def why_not(tensor: Tensor | None = None) -> None:
    """None: the law reads everything."""


def append(
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    pools: tuple[Tensor, Tensor, Tensor],
    lanes: Lanes,
    first: list[int],
    sketch: Tensor | None,
    bits: int,
) -> None:
    """Writes tokens ``key`` [b, h, t, d], ``value`` [b, h, t, dv] and ``positions`` [b, t] to the pools (keys, values,
    positions) behind the first ``first[lane]`` tokens of each lane."""
    checks.appending(key, value, positions, pools, lanes, first)
    checks.check(sketch is None, "the law keeps no sketches")
    slots = behind(lanes, first, key.shape[2], key.device).flatten()
    per_lane = positions[:, None].expand(key.shape[:3]).to(torch.int32)
    for held, new in zip(pools, (key, value, per_lane[..., None]), strict=True):
        held.view(held.shape[0] * held.shape[1], -1).index_copy_(0, slots, new.reshape(-1, new.shape[-1]))


def gather(
    keys: Tensor,
    values: Tensor,
    lanes: Lanes,
    index: Tensor,
    angles: Angles,
    interleaved: bool,
    out: tuple[Tensor, Tensor],
) -> None:
    """Writes the tokens ``index`` [b, q, m] to ``out`` [b, q, h, m, d] each, keys rotated by ``angles`` [m, r] or
    [b, q, m, r]; or ``index`` [m] of one sequence to [h, m, d]."""
    checks.gathering(keys, values, index, out, angles)
    lists = index.view(-1, *index.shape[-2:]) if index.dim() > 1 else index[None, None]
    key, value = (listed(pool, lanes, lists).transpose(1, 2) for pool in (keys, values))
    cos, sin = (a if a.dim() == 2 else a[:, :, None] for a in angles)
    for held, new in zip(out, (reference.rotate(key, cos, sin, interleaved=interleaved), value), strict=True):
        held.copy_(new.reshape(held.shape))


def rotate(x: Tensor, angles: Angles, interleaved: bool) -> Tensor:
    """``reference.rotate`` of ``x`` [b, heads, n, d] by ``angles`` [n, r] or [b or 1, n, r]."""
    checks.rotation(x, angles)
    cos, sin = (a if a.dim() == 2 else a[:, None] for a in angles)
    return reference.rotate(x, cos, sin, interleaved=interleaved)
