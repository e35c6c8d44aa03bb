"""The mask function: never an N x N mask for kvote's layers, the native one for all others."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from kvote.errors import InputError
from kvote.hf.compiling import uncompiled


@dataclass
class Padding:
    """Which new and past columns are tokens, and how to make the mask that other caches need.

    ``valid`` [b, t] and ``past`` [b, seen] are None where all are tokens.
    """

    valid: Tensor | None
    past: Tensor | None
    native: Callable[..., Tensor | None]
    _made: list[Tensor | None] = field(default_factory=list)

    def native_mask(self) -> Tensor | None:
        if not self._made:
            self._made.append(self.native())
        return self._made[0]


class Carrier(Tensor):
    """Stands for a causal mask [b, 1, t, n] on its way to kvote's attention, and holds no numbers: padding rides on it.

    To code that looks into it, or makes another mask of it, it is the native mask, made then; what comes out is a mask
    that kvote does not know.
    """

    padding: Padding

    @classmethod
    def of(cls, padding: Padding, sizes: tuple[int, ...], device: torch.device) -> "Carrier":
        # One number, seen as many times as the mask has entries.
        carrier = torch.ones(1, dtype=torch.bool, device=device).expand(sizes).as_subclass(cls)
        carrier.padding = padding
        return carrier

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FACTS:
                return func(*args, **kwargs)
            # On another device it is the same; as other numbers it is looked into.
            moved = func in _SAME and not any(
                isinstance(x, torch.dtype | Tensor) for x in (*args[1:], *kwargs.values())
            )
            if moved and isinstance(args[0], cls):
                return args[0]
            return func(*tree_map(_seen, args), **tree_map(_seen, kwargs))


def _seen(x: Any) -> Any:
    """The native mask in place of a carrier; where there is none because attention is causal anyway, one is made."""
    if not isinstance(x, Carrier):
        return x
    made = x.padding.native_mask()
    return x.padding.native(allow_is_causal_skip=False) if made is None else made


_FACTS = {
    Tensor.dim,
    Tensor.size,
    Tensor.stride,
    *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "layout", "ndim", "requires_grad", "shape")),
}
_SAME = {Tensor.to, Tensor.contiguous, Tensor.detach, Tensor.cpu, Tensor.cuda}


def mask(native: str, **kwargs: Any) -> Tensor | None:
    """The mask function: for full attention a ``Carrier``, for all else the native mask."""
    made: Tensor | None = _mask(native, torch.compiler.is_compiling(), **kwargs)
    return made


@uncompiled
def _mask(native: str, compiling: bool, **kwargs: Any) -> Tensor | None:
    if isinstance(kwargs["q_offset"], Tensor):
        # A static cache counts in place, and the native mask is made after it has counted this pass.
        kwargs["q_offset"] = kwargs["q_offset"].clone()
    make = partial(ALL_MASK_ATTENTION_FUNCTIONS.get(native, _no_mask), **kwargs)
    if kwargs["mask_function"] is not causal_mask_function:
        return make()
    tokens, t = kwargs.get("attention_mask"), kwargs["q_length"]
    valid = past = None
    if tokens is not None:
        seen = kwargs["q_offset"]
        if tokens.shape[1] < seen + t:
            raise InputError(
                f"The attention mask covers {tokens.shape[1]} tokens, but the cache holds {seen} and {t} are new; pass "
                "a mask over all of them."
            )
        new = tokens[:, seen : seen + t]
        valid = None if bool(new.all()) else new
        past = None if bool(tokens[:, :seen].all()) else tokens[:, :seen]
    padding = Padding(valid, past, make)
    if compiling:
        # Compiled code cannot be handed a tensor of another class. Code that looked into this one would fail.
        empty = torch.empty(0, 0, 0, 0, dtype=torch.bool, device=kwargs["device"])
        empty.padding = padding  # type: ignore[attr-defined]
        return empty
    return Carrier.of(padding, (kwargs["batch_size"], 1, t, kwargs["kv_length"]), kwargs["device"])


def _no_mask(**kwargs: Any) -> None:
    """What transformers makes for an attention function that no mask function was registered with."""


def padding_of(carrier: Tensor | None) -> Padding | None:
    """What rides on a mask made here; None for any other mask."""
    return getattr(carrier, "padding", None)
