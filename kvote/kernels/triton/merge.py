"""Joins the answers of parts of a lane by their log-sum-exp."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvote.kernels.triton.common import at_home, padded


@triton.jit(do_not_specialize=("parts",))
def _merge(outs, lses, out, lse, parts, D: tl.constexpr, DP: tl.constexpr, AT_ONCE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, DP)
    some = tl.arange(0, AT_ONCE)
    most = tl.full([AT_ONCE], float("-inf"), tl.float32)
    for at in range(0, parts, AT_ONCE):
        most = tl.maximum(most, tl.load(lses + row * parts + at + some, mask=at + some < parts, other=float("-inf")))
    top = tl.max(most, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([AT_ONCE], tl.float32)
    sums = tl.zeros([DP], tl.float32)
    for at in range(0, parts, AT_ONCE):
        held = at + some < parts
        weight = tl.exp(tl.load(lses + row * parts + at + some, mask=held, other=float("-inf")) - top)
        places = (row * parts + at + some)[:, None] * D + channels[None, :]
        part = tl.load(outs + places, mask=held[:, None] & (channels < D)[None, :], other=0.0)
        sums += tl.sum(weight[:, None] * part, 0)
        total += weight
    mass = tl.sum(total, 0)
    safe = tl.where(mass > 0, mass, 1.0)
    tl.store(out + row * D + channels, sums / safe, mask=channels < D)
    tl.store(lse + row, tl.where(mass > 0, top + tl.log(safe), float("-inf")))


@at_home
def merge_parts(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Out [..., d] and lse [...] of ``outs`` [..., parts, d] and ``lses`` [..., parts], all float32 and contiguous.

    A row whose parts all saw nothing answers 0 with an lse of -inf.
    """
    *shape, parts, dim = outs.shape
    if parts == 1:
        return outs.squeeze(-2), lses.squeeze(-1)
    out = torch.empty(*shape, dim, dtype=torch.float32, device=outs.device)
    lse = torch.empty(shape, dtype=torch.float32, device=outs.device)
    _merge[(lse.numel(),)](outs, lses, out, lse, parts, D=dim, DP=padded(dim), AT_ONCE=16, num_warps=4)
    return out, lse
