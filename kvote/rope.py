"""Rotary positions of any model: undo what the model rotated, redo it at another position.

A rotation is undone exactly with its own cosines and sines, so keys can be stored at position 0 and placed anywhere
when they are read. Half-precision models round cos and sin, which makes their rotation change lengths slightly;
dividing by cos^2 + sin^2 undoes that too, and with it the attention scaling of YaRN and LongRoPE.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote.kernels.reference import rotate

# (positions int64 [rows, n], dtype) -> the (cos, sin) that the model itself would use, each [rows, n, channels]
RotaryModule = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]

_TABLES_KEPT = 8


@dataclass
class Rope:
    """The rotary embedding of a layer, or of all layers that share it.

    ``repeated``: the model's cos/sin hold every angle twice. ``fresh``: makes the module as it was before it saw a
    position, where angles depend on more than their own position (LongRoPE and dynamic NTK look at the largest).
    """

    module: RotaryModule
    interleaved: bool = False
    repeated: bool = True
    fresh: Callable[[], RotaryModule] | None = None
    _tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def fixed(self) -> bool:
        """Whether angles depend on nothing but the position."""
        return self.fresh is None

    @property
    def nbytes(self) -> int:
        """Bytes of the tables kept between calls."""
        return sum(a.untyped_storage().nbytes() for table in self._tables.values() for a in table)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., n, r], one per pair of channels, at ``positions`` int64 [..., n]."""
        return self._angles(self.module, positions, dtype)

    def _angles(self, module: RotaryModule, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos, sin = module(positions.reshape(-1, positions.shape[-1]), dtype)
        if self.repeated:
            cos, sin = (x[..., ::2] if self.interleaved else x[..., : x.shape[-1] // 2] for x in (cos, sin))
        shape = (*positions.shape, cos.shape[-1])
        return cos.float().reshape(shape), sin.float().reshape(shape)

    def contiguous(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The angles [count, r] of positions 0 .. count - 1, in float32."""
        # One table that grows serves every count, unless angles depend on the largest position.
        size = max([1 << max(9, (count - 1).bit_length()), *(n for n, _ in self._tables)]) if self.fixed else count
        if (size, device) not in self._tables:
            if self.fixed or len(self._tables) >= _TABLES_KEPT:
                self._tables.clear()
            module = self.module if self.fresh is None else self.fresh()
            cos, sin = self._angles(module, torch.arange(size, device=device), torch.float32)
            self._tables[(size, device)] = cos.clone(), sin.clone()
        cos, sin = self._tables[(size, device)]
        return cos[:count], sin[:count]

    def undo(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Takes the model's rotation by ``angles`` [rows, n, r] each out of ``x`` [rows, heads, n, d]."""
        cos, sin = (a[:, None] for a in angles)
        length = cos.square() + sin.square()
        return rotate(x, cos / length, -sin / length, interleaved=self.interleaved)

    def apply(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Rotates ``x`` [..., n, d] by ``angles``, each [..., n, r]."""
        return rotate(x, *angles, interleaved=self.interleaved)
