"""The model's rotary module: where its angles come from, and at which positions it was last asked for them."""

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from kvote.errors import InactiveCacheError
from kvote.hf.recording import ModuleCall

# (positions int64 [rows, n], dtype) -> the model's own (cos, sin), each [rows, n, channels]
ModelAngles = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]


def pair(output: Any) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines [rows, n, channels], if that is what a module returned: a pair, or complex numbers."""
    if isinstance(output, Tensor) and output.is_complex():
        return _batched(output.real, output.imag)
    if isinstance(output, tuple | list) and len(output) == 2 and all(isinstance(x, Tensor) for x in output):
        cos, sin = output
        if cos.shape == sin.shape and cos.is_floating_point():
            return _batched(cos, sin)
    return None


def _batched(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor] | None:
    if cos.dim() == 2:
        return cos[None], sin[None]
    return (cos, sin) if cos.dim() == 3 else None


def positions_given(call: ModuleCall) -> Tensor | None:
    """The positions that a rotary module was called with: its one tensor of whole numbers."""
    whole = [x for x in (*call.args, *call.kwargs.values()) if isinstance(x, Tensor) and not x.is_floating_point()]
    return whole[0] if len(whole) == 1 and whole[0].dtype == torch.int64 and whole[0].dim() in (1, 2, 3) else None


def caller(call: ModuleCall, function: Callable[..., Any] | None = None) -> ModelAngles:
    """Calls the module again as in ``call``, at other positions. ``function`` instead of the module itself, if
    given."""
    # Not through the module's hooks: kvote notes with one what the model itself asks for.
    function = call.module.forward if function is None else function
    given = positions_given(call)
    assert given is not None

    def model_angles(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # All dimensions of an image's positions are alike in text.
        places = positions.expand(given.shape[0], *positions.shape) if given.dim() == 3 else positions
        places = places[0] if given.dim() == 1 else places

        def again(x: Any) -> Any:
            if x is given:
                return places
            if isinstance(x, Tensor) and x.is_floating_point():
                return torch.empty((*positions.shape, 0), dtype=dtype, device=positions.device)
            return x

        angles = pair(function(*map(again, call.args), **{name: again(x) for name, x in call.kwargs.items()}))
        assert angles is not None
        cos, sin = (x.expand(positions.shape[0], -1, -1) for x in angles)
        return cos, sin

    return model_angles


class RotaryPositions:
    """Notes the positions that a rotary module is called with, where attention is not told them as they are: models
    with positions in three dimensions hand on others, or none. Each thread is told of its own passes."""

    def __init__(self, module: torch.nn.Module | None = None) -> None:
        self._module = None if module is None else ref(module)
        self._seen = threading.local()
        self._handle: Any = None

    @classmethod
    def of(cls, module: torch.nn.Module) -> "RotaryPositions":
        """The one of ``module``, whoever asks."""
        return _watched.setdefault(module, cls(module))

    def note_positions(self) -> None:
        """Starts to note positions, once. ``release`` ends it."""
        module = None if self._module is None else self._module()
        if self._handle is None and module is not None:
            self._handle = module.register_forward_pre_hook(self._note, with_kwargs=True)

    def release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _note(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A copy of a model has the hook of the first one, and one of its own.
        if self._module is not None and self._module() is module:
            self._seen.positions = positions_given(ModuleCall(module, args, kwargs))

    def positions(self) -> Tensor | None:
        """The latest, [1 or b, t]; None if they have dimensions that differ. Raises InactiveCacheError if released."""
        if self._handle is None:
            raise InactiveCacheError("kvote.detach(model) was called after this cache was made; make a new one.")
        last: Tensor | None = getattr(self._seen, "positions", None)
        if last is None or last.dim() == 2:
            return last
        if last.dim() == 1:
            return last[None]
        return last[0] if bool((last == last[:1]).all()) else None

    def __deepcopy__(self, memo: dict[int, Any]) -> "RotaryPositions":
        return self

    def __reduce__(self) -> Any:
        # Saved with a model, it watches nothing.
        return RotaryPositions, ()


_watched: "WeakKeyDictionary[torch.nn.Module, RotaryPositions]" = WeakKeyDictionary()
