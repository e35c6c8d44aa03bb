"""Transforms: what keys or values become before they are rounded to a grid; undone when they are read."""

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# The size of the second of the two factors in which a rotation is multiplied, if there are two.
_FACTOR = 32


class Transform(Protocol):
    """Of the keys or values [b, h, n, d] of all key heads of a layer, each token for itself. ``mixes``: whether heads
    become mixed, so that one of them can only be made again from all."""

    @property
    def mixes(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...
    def apply(self, x: Tensor) -> Tensor: ...
    def undo(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Rotation:
    """Channels are rotated by a Hadamard matrix, in which outliers spread over all of them: those of ``heads``
    neighbouring key heads together, or of as many as divide all that there are. Then they are put in ``order``: for
    every channel of the layer, of which rotated one it is; none: they stay."""

    heads: int = 1
    order: tuple[int, ...] = ()

    def of(self, heads: int, dim: int, device: torch.device) -> "Rotated":
        """The rotation of a layer with so many key heads. Raises ValueError for an order of other channels."""
        if self.order and len(self.order) != heads * dim:
            raise ValueError(f"an order of {len(self.order)} channels does not fit {heads} key heads of {dim}")
        together = math.gcd(self.heads, heads)
        if not self.order:
            return Rotated(together)
        order = torch.tensor(self.order, device=device)
        return Rotated(together, order, order.argsort())


@dataclass(frozen=True)
class Rotated:
    """A ``Rotation`` on a device; ``back`` undoes ``order``, both int64 [h * d]."""

    heads: int
    order: Tensor | None = None
    back: Tensor | None = None

    @property
    def mixes(self) -> bool:
        return self.heads > 1 or self.order is not None

    @property
    def nbytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in (self.order, self.back) if x is not None)

    def apply(self, x: Tensor) -> Tensor:
        turned = _apart(hadamard(_together(x.float(), self.heads)), x.shape)
        return (turned if self.order is None else _picked(turned, self.order)).to(x.dtype)

    def undo(self, x: Tensor) -> Tensor:
        # The order was made of rotated channels, so it is undone first; the rotation is its own inverse.
        turned = x.float() if self.back is None else _picked(x.float(), self.back)
        return _apart(hadamard(_together(turned, self.heads)), x.shape).to(x.dtype)


def _together(x: Tensor, heads: int) -> Tensor:
    """[b, h, n, d] as [b, h / heads, n, heads * d]."""
    b, h, n, d = x.shape
    return x.view(b, h // heads, heads, n, d).transpose(2, 3).reshape(b, h // heads, n, heads * d)


def _apart(x: Tensor, shape: torch.Size) -> Tensor:
    b, _, n, d = shape
    return x.view(b, x.shape[1], n, -1, d).transpose(2, 3).reshape(shape)


def _picked(x: Tensor, order: Tensor) -> Tensor:
    """Channels [b, h, n, d], counted over all heads, in an ``order``."""
    b, h, n, d = x.shape
    flat = x.transpose(1, 2).reshape(b, n, h * d).index_select(-1, order)
    return flat.view(b, n, h, d).transpose(1, 2).contiguous()


def hadamard(x: Tensor) -> Tensor:
    """``x`` [..., n] times the orthonormal, symmetric Hadamard matrix (of Sylvester) of size n; where n is no power of
    two, blocks of the largest power of two that divides n are multiplied, each by its own."""
    n = x.shape[-1]
    size = n & -n
    right = min(size, _FACTOR)
    # H of a * b is the Kronecker product of H of a and H of b.
    blocks = x.reshape(*x.shape[:-1], n // size, size // right, right) @ _matrix(right).to(x)
    if size > right:
        blocks = _matrix(size // right).to(x) @ blocks
    return blocks.reshape(x.shape)


@functools.cache
def _matrix(n: int) -> Tensor:
    """Orthonormal, float32 [n, n]; n is a power of two."""
    signs = torch.ones(1, 1)
    while len(signs) < n:
        signs = torch.cat([torch.cat([signs, signs], dim=1), torch.cat([signs, -signs], dim=1)])
    return signs / math.sqrt(n)
