"""Rotary positions of any model: undo what the model rotated, redo it at another position.

A rotation is undone exactly with its own cosines and sines, so keys can be stored at position 0 and placed anywhere
when they are read. Half-precision models round cos and sin, which makes their rotation change lengths slightly;
dividing by cos^2 + sin^2 undoes that too, and with it the attention scaling of YaRN and LongRoPE.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote import kernels
from kvote.memory import storage_bytes

# (positions int64 [rows, n], dtype) -> the model's own (cos, sin), each [rows, n, pairs of channels]
Angles = tuple[Tensor, Tensor]
RotaryModule = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]

_TABLES_KEPT = 8
# Positions of a decode step that are looked up together.
_BLOCK = 64


@dataclass
class Rope:
    """The rotary embedding of a layer, or of all layers that share it.

    ``interleaved``: whether neighbours are a pair, or channels half of the rotated part apart. ``fresh``: makes the
    module as it was before it saw a position, where angles depend on more than their own position (LongRoPE and
    dynamic NTK look at the largest). ``last_module``: there, the module with the frequencies of its last pass.
    """

    module: RotaryModule
    interleaved: bool = False
    fresh: Callable[[], RotaryModule] | None = None
    last_module: RotaryModule | None = None
    _tables: dict[tuple[int, torch.device], Angles] = field(default_factory=dict, repr=False)
    _blocks: dict[tuple[int, torch.dtype, torch.device], Angles] = field(default_factory=dict, repr=False)
    # Angles of the last positions asked for: all layers of a forward pass ask for the same. ``_backwards`` undoes them.
    _last: tuple[Tensor, tuple[object, ...], Angles] | None = field(default=None, repr=False)
    _backwards: tuple[Angles, Angles] | None = field(default=None, repr=False)

    def anew(self) -> "Rope":
        """The same rotation with nothing remembered: what is kept between calls belongs to one cache and its thread."""
        return Rope(self.module, self.interleaved, self.fresh, self.last_module)

    @property
    def fixed(self) -> bool:
        """Whether angles depend on nothing but the position."""
        return self.fresh is None

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept between calls."""
        kept = [a for table in (*self._tables.values(), *self._blocks.values()) for a in table]
        if self._last is not None:
            kept += [self._last[0], *self._last[2]]
        if self._backwards is not None:
            kept += [a for pair in self._backwards for a in pair]
        return storage_bytes(kept)

    def angles(self, positions: Tensor, dtype: torch.dtype) -> Angles:
        """Cosines and sines [..., n, r], one per pair of channels, at ``positions`` int64 [..., n]."""
        if positions.is_inference():
            return self._angles(self.module, positions, dtype)
        # The tensor itself is held, so that its memory cannot become another one's while it stands for these angles.
        shape = (positions.data_ptr(), positions.shape, positions.stride(), positions._version, dtype)
        if self._last is None or self._last[1] != shape:
            self._last = positions, shape, self._angles(self.module, positions, dtype)
        return self._last[2]

    def _angles(self, module: RotaryModule, positions: Tensor, dtype: torch.dtype) -> Angles:
        cos, sin = module(positions.reshape(-1, positions.shape[-1]), dtype)
        shape = (*positions.shape, cos.shape[-1])
        return cos.float().reshape(shape), sin.float().reshape(shape)

    def contiguous(self, count: int, device: torch.device, start: int = 0) -> Angles:
        """Float32 angles [count - start, r] of positions ``start`` .. count - 1, as where ``count`` are in use."""
        cos, sin = self.table(count, device)
        return cos[start:count], sin[start:count]

    def table(self, count: int, device: torch.device) -> Angles:
        """The same of positions 0 .. count - 1 and, where angles are ``fixed``, perhaps of more."""
        # One table that grows serves every count, unless angles depend on the largest position.
        if self.fixed:
            for (size, place), kept in self._tables.items():
                if size >= count and place == device:
                    return kept
        size = max([1 << max(9, (count - 1).bit_length()), *(n for n, _ in self._tables)]) if self.fixed else count
        if (size, device) not in self._tables:
            if self.fixed or len(self._tables) >= _TABLES_KEPT:
                self._tables.clear()
            module = self.module if self.fresh is None else self.fresh()
            cos, sin = self._angles(module, torch.arange(size, device=device), torch.float32)
            rows = torch.contiguous_format
            self._tables[(size, device)] = cos.clone(memory_format=rows), sin.clone(memory_format=rows)
        return self._tables[(size, device)]

    def once(self, positions: Tensor) -> Angles:
        """``angles`` in float32, with the frequencies that the model last used, for positions that will not be asked
        for again. Nothing remembers them, and the model's module stays as it is."""
        return self._angles(self.module if self.last_module is None else self.last_module, positions, torch.float32)

    @staticmethod
    def back(angles: Angles) -> Angles:
        """The angles that undo these, lengths included."""
        cos, sin = angles
        length = cos.square() + sin.square()
        return cos / length, -sin / length

    def back_at(self, position: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, int]:
        """The angles [n, r] each that undo what a model of ``dtype`` has rotated to some positions, and the row that is
        ``position``; where angles are ``fixed``."""
        key = position // _BLOCK, dtype, device
        block = self._blocks.get(key)
        if block is None:
            if len(self._blocks) >= _TABLES_KEPT:
                self._blocks.clear()
            start = key[0] * _BLOCK
            angles = self._angles(self.module, torch.arange(start, start + _BLOCK, device=device)[None], dtype)
            cos, sin = self.back(angles)
            block = self._blocks[key] = cos[0].contiguous(), sin[0].contiguous()
        return *block, position % _BLOCK

    def undo(self, x: Tensor, angles: Angles) -> Tensor:
        """Takes the model's rotation by ``angles`` [rows, n, r] each out of ``x`` [rows, heads, n, d]."""
        if self._backwards is None or self._backwards[0] is not angles:
            cos, sin = self.back(angles)
            self._backwards = angles, (cos[:, None], sin[:, None])
        return kernels.rotate(x, *self._backwards[1], interleaved=self.interleaved)

    def apply(self, x: Tensor, angles: Angles) -> Tensor:
        """Rotates ``x`` [..., n, d] by ``angles``, each [..., n, r]."""
        return kernels.rotate(x, *angles, interleaved=self.interleaved)
