"""A grid of equal steps in short torch: numbers that share least and step in whatever way, and their codes in bytes."""

import torch
from torch import Tensor


def span(least: Tensor, most: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Least and step, [2, ...] of ``dtype``; 0 where there is nothing."""
    there = least <= most
    least, most = (torch.where(there, x, torch.zeros_like(x)) for x in (least, most))
    step = (most - least) / (2**bits - 1)
    step = step.clamp(max=min(torch.finfo(dtype).max, torch.finfo(step.dtype).max))
    return torch.stack([least.to(dtype), step.to(dtype)])


def coded(x: Tensor, least: Tensor, step: Tensor, bits: int) -> Tensor:
    """Codes uint8 of numbers, to the nearest step."""
    steps = (x - least) / torch.where(step > 0, step, torch.ones_like(step))
    return steps.round().clamp(0, 2**bits - 1).to(torch.uint8)


def decoded(codes: Tensor, least: Tensor, step: Tensor) -> Tensor:
    """The numbers that codes stand for, rounded once."""
    return (codes.float() * step.float() + least.float()).to(least.dtype)


def packed(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [tokens, d] side by side in bytes [tokens, ceil(d * bits / 8)]: equal slices of the channels, the
    first in the lowest bits."""
    each = 8 // bits
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each))
    slices = filled.view(len(codes), each, filled.shape[1] // each)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (slices << shifts[:, None]).sum(1, dtype=torch.uint8)


def unpacked(held: Tensor, bits: int, d: int) -> Tensor:
    """The codes [tokens, d] again."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=held.device)
    return ((held[:, None] >> shifts[:, None]) & (2**bits - 1)).flatten(1)[:, :d]
