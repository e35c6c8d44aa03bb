"""How a layer rotates its keys, found out from keys of the same hidden states at two positions."""

import copy
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvote.hf.recording import ModuleCall
from kvote.hf.rotary import ModelAngles, caller, pair, positions_given
from kvote.rope import Angles, Rope, RotaryModule

# Largest relative difference that rounding makes between keys that were rotated and rotated back.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.2e-2}


@dataclass(frozen=True)
class RotatedState:
    """One state of a key or query [b, h, 1, d] at a position [b, 1] each."""

    x: Tensor
    positions: Tensor


def coarsest(model: torch.nn.Module) -> torch.dtype:
    """The dtype of the least precision in which ``model`` holds weights, of those that numbers are rounded to."""
    held = {weight.dtype for weight in model.parameters()}
    return next((dtype for dtype in reversed(_ROUNDING) if dtype in held), torch.float32)


def same(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether two tensors are equal but for rounding to their dtype and to ``dtype``."""
    rounding = max(_ROUNDING.get(kind, 1.2e-2) for kind in (a.dtype, dtype))
    a, b = a.float(), b.float()
    return bool((a - b).norm() <= rounding * max(float(a.norm()), 1e-30))


def identity() -> Rope:
    """The rope of layers that rotate nothing: an angle of zero for one pair of channels."""

    def zero(positions: Tensor, dtype: torch.dtype) -> Angles:
        cos = torch.ones(*positions.shape, 1, dtype=dtype, device=positions.device)
        return cos, torch.zeros_like(cos)

    return Rope(zero)


def rope_of(call: ModuleCall, keys: tuple[RotatedState, RotatedState], dtype: torch.dtype) -> Rope | None:
    """The rope by which both keys become one un-rotated key again, with the angles of ``call``; None if no form does
    it."""
    model_angles = caller(call)
    fresh, last_module = _moving(call)
    for take, direction, interleaved in itertools.product(_TAKES, (1, -1), (False, True)):
        canonical = partial(_canonical, take, direction)
        rope = Rope(
            canonical(model_angles),
            interleaved,
            None if fresh is None else lambda canonical=canonical, fresh=fresh: canonical(fresh()),  # type: ignore[misc]
            None if last_module is None else canonical(last_module),
        )
        if undoes(rope, keys, dtype):
            return rope
    return None


def undoes(rope: Rope, states: tuple[RotatedState, RotatedState], dtype: torch.dtype) -> bool:
    """Whether ``rope`` makes one of both states, but for rounding to ``dtype``."""
    back = []
    for state in states:
        angles = rope.angles(state.positions, state.x.dtype)
        if not 0 < 2 * angles[0].shape[-1] <= state.x.shape[-1]:
            return False
        back.append(rope.undo(state.x, angles))
    return same(back[0], back[1], dtype)


def _halves(x: Tensor) -> Tensor:
    return x[..., : x.shape[-1] // 2]


def _every_second(x: Tensor) -> Tensor:
    return x[..., ::2]


def _all(x: Tensor) -> Tensor:
    return x


# Models return each angle twice, in halves or side by side, or once.
_TAKES: tuple[Callable[[Tensor], Tensor], ...] = (_halves, _every_second, _all)


def _canonical(take: Callable[[Tensor], Tensor], direction: int, model_angles: ModelAngles) -> RotaryModule:
    """The model's angles once per pair of channels, in the direction in which kvote rotates."""

    def angles(positions: Tensor, dtype: torch.dtype) -> Angles:
        cos, sin = model_angles(positions, dtype)
        return take(cos), direction * take(sin)

    return angles


def _moving(call: ModuleCall) -> tuple[Callable[[], ModelAngles] | None, ModelAngles | None]:
    """For angles that depend on the largest position (LongRoPE, dynamic NTK): a function that makes a module that has
    seen none, and the module with the frequencies of its last pass; else None for both."""
    rotary: Any = call.module
    if not any(kind in str(getattr(rotary, "rope_type", "")) for kind in ("longrope", "dynamic")):
        return None, None
    # Below the decorator that chooses frequencies by the largest position.
    last_module = caller(call, partial(inspect.unwrap(type(rotary).forward), rotary))
    return partial(_fresh, call), last_module


def _fresh(call: ModuleCall) -> ModelAngles:
    clone: Any = copy.deepcopy(call.module)
    if hasattr(clone, "original_inv_freq"):
        clone.inv_freq = clone.original_inv_freq.clone()
        clone.max_seq_len_cached = clone.original_max_seq_len
    return caller(ModuleCall(clone, call.args, call.kwargs))


def rotary_calls(calls: list[ModuleCall]) -> list[ModuleCall]:
    """The calls among ``calls`` that made cosines and sines for positions."""
    return [call for call in calls if pair(call.output) is not None and positions_given(call) is not None]
