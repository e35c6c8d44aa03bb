"""The mask function: never an N x N mask for kvote's layers, the native one for all others."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

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
    _spans: list[tuple[int, int]] = field(default_factory=list)

    def native_mask(self) -> Tensor | None:
        if not self._made:
            self._made.append(self.native())
        return self._made[0]

    def spans(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """The first and last new column of each row that is a token, as (start, stop). Raises InputError where padding
        stands between tokens."""
        if not self._spans:
            whole = [[True] * columns] * rows if self.valid is None else self.valid.tolist()
            for row, real in enumerate(whole):
                start = real.index(True) if True in real else 0
                stop = start + sum(real)
                if not all(real[start:stop]):
                    raise InputError(f"Row {row} has padding between its tokens; put it before or behind them.")
                self._spans.append((start, stop))
        return self._spans

    def of_row(self, t: int, seen: int, held: int, first: int) -> Tensor | None:
        """The native mask of one row alone, of which ``t`` columns are new, ``seen`` came before, and keys ``first`` to
        ``first + held`` are there."""
        assert isinstance(self.native, partial)
        sizes = {"batch_size": 1, "q_length": t, "kv_length": held, "q_offset": seen, "kv_offset": first}
        made: Tensor | None = self.native(**{**sizes, "attention_mask": None})
        return made


class NewColumns(int):
    """An offset of nothing, in a batch of several caches: masks are made for the new columns alone."""


class MaskCarrier(Tensor):
    """Stands for a causal mask [b, 1, t, n] on its way to kvote's attention, and holds no numbers: padding rides on it.

    To code that looks into it, or makes another mask of it, it is the native mask, made then; what comes out is a mask
    that kvote does not know.
    """

    padding: Padding

    @classmethod
    def of(cls, padding: Padding, sizes: tuple[int, ...], device: torch.device) -> "MaskCarrier":
        # One number, expanded to the size of the mask.
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
    if not isinstance(x, MaskCarrier):
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
    """The mask function: for full attention a ``MaskCarrier``, for all else the native mask; None where ``sdpa_mask``
    says that too, for single tokens without padding."""
    compiling = torch.compiler.is_compiling()
    if not compiling and native == "sdpa" and kwargs.get("attention_mask") is None and _sees_all(kwargs):
        return None
    made: Tensor | None = (_mask_apart if compiling else _mask)(native, compiling, **kwargs)
    return made


def _mask(native: str, compiling: bool, **kwargs: Any) -> Tensor | None:
    if isinstance(kwargs["q_offset"], Tensor):
        # A static cache counts in place, and the native mask is made after it has counted this pass.
        kwargs["q_offset"] = kwargs["q_offset"].clone()
    make = partial(ALL_MASK_ATTENTION_FUNCTIONS.get(native, _no_mask), **kwargs)
    apart = isinstance(kwargs["q_offset"], NewColumns)
    if kwargs["mask_function"] is not causal_mask_function and not (apart and _slides(kwargs["mask_function"])):
        return make()
    tokens, t = kwargs.get("attention_mask"), kwargs["q_length"]
    if apart and tokens is not None and tokens.shape[1] != t:
        raise InputError(
            f"The attention mask of several caches says which of the {t} new columns are tokens; got {tokens.shape[1]} "
            "columns."
        )
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
    if native == "sdpa" and valid is past is None and not compiling and _sees_all(kwargs):
        return None
    padding = Padding(valid, past, make)
    if compiling:
        # Compiled code cannot be handed a tensor of another class. Code that looked into this one would fail.
        empty = torch.empty(0, 0, 0, 0, dtype=torch.bool, device=kwargs["device"])
        empty.padding = padding  # type: ignore[attr-defined]
        return empty
    return MaskCarrier.of(padding, (kwargs["batch_size"], 1, t, kwargs["kv_length"]), kwargs["device"])


_mask_apart = uncompiled(_mask)


def _sees_all(kwargs: dict[str, Any]) -> bool:
    """Whether a single new token is the last of the keys that it is given, and no mask is asked for nevertheless."""
    seen = kwargs["q_offset"]
    if kwargs["q_length"] != 1 or kwargs["mask_function"] is not causal_mask_function or isinstance(seen, Tensor):
        return False
    last = kwargs["kv_length"] == seen + 1 and not kwargs.get("kv_offset")
    return last and kwargs.get("local_size") is None and bool(kwargs.get("allow_is_causal_skip", True))


def _slides(function: Any) -> bool:
    """Whether a mask function is that of a plain sliding window."""
    if getattr(function, "__code__", None) is not _SLIDING.__code__:
        return False
    parts = function.__closure__[0].cell_contents
    return [part.__code__ for part in parts] == [part.__code__ for part in _SLIDING.__closure__[0].cell_contents]


_SLIDING: Any = sliding_window_causal_mask_function(1)


def _no_mask(**kwargs: Any) -> None:
    """What transformers makes for an attention function that no mask function was registered with."""


def padding_of(carrier: Tensor | None) -> Padding | None:
    """The padding that a mask made here carries; None for any other mask."""
    return getattr(carrier, "padding", None)
