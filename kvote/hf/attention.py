"""The attention function: kvote's layers attend by themselves, keys of other caches go to the native function."""

import functools
import sys
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from kvote.errors import InputError, UnsupportedModelError
from kvote.hf.cache_layer import CacheLayer, owner_of
from kvote.hf.compiling import uncompiled
from kvote.hf.mask import Padding, padding_of
from kvote.hf.recording import note_attention
from kvote.hf.rows_layer import AttentionInputs, RowsLayer
from kvote.store.segment import Scaling

_REFUSED = ("position_bias", "sliding_window", "cache")
# What transformers collects for its caller in this pass, where this release says so.
_collected: ContextVar[dict[str, Any] | None] = getattr(
    output_capturing, "_active_collector", ContextVar("nothing collected", default=None)
)


@uncompiled
def attention(
    native: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function. Layers of other caches (sliding ones of a hybrid model, say) go to ``native``.

    Raises UnsupportedModelError for what the model asks of attention and kvote has not, and InputError for gradients
    and attention weights.
    """
    note_attention(module, query, key, value, attention_mask, kwargs)
    padding = padding_of(attention_mask)
    owner = owner_of(key)
    if owner is None:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(native, _eager_of(module))
        mask = attention_mask if padding is None else padding.native_mask()
        return attend(module, query, key, value, mask, **kwargs)
    if isinstance(owner, RowsLayer) and not owner.pending:
        raise UnsupportedModelError(
            f"{type(module).__name__} reads the keys of another layer, which several caches in one batch cannot do; "
            "run each cache by itself."
        )
    owner.pending = False
    _check(module, attention_mask, padding, kwargs, windowed=owner.is_sliding)
    # Kernels read rows of channels.
    if query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    positions = _positions(module, owner, kwargs.get("position_ids"))
    scale = kwargs.get("scaling")
    scale, sinks = query.shape[-1] ** -0.5 if scale is None else scale, "s_aux"
    scaling = _scaling(scale, kwargs.get("softcap"))
    if isinstance(owner, RowsLayer):
        given = AttentionInputs(query, key, value, positions, padding, scaling, kwargs.get(sinks))
        out = owner.attend(given, partial(_native, native, module, kwargs))
    else:
        valid = None if padding is None or padding.valid is None else padding.valid.to(query.device)
        past = None if padding is None or padding.past is None else padding.past.to(query.device)
        prepacked = owner.announced.prepacked
        if prepacked is not None:
            query, key, value = map(prepacked.unpack, (query, key, value))
            positions, valid, past = prepacked.positions, prepacked.valid, None
        out = owner.layer.attend(owner.step(query, key, value, positions, scaling, kwargs.get(sinks), valid, past))
        if prepacked is not None:
            out = prepacked.pack(out)
    # Model files go on with .view(), which needs what transformers' own functions return: contiguous answers.
    out = out.contiguous()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)) and not out.requires_grad:
        out = _NoGradient.apply(out, query, key, value)  # type: ignore[no-untyped-call]
    return out, None


def _native(
    native: str, module: torch.nn.Module, kwargs: dict[str, Any], query: Tensor, key: Tensor, value: Tensor, mask: Any
) -> Tensor:
    """The native function's attention [1, t, heads, dv] for one row of a batch."""
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(native, _eager_of(module))
    out: Tensor = attend(module, query, key, value, mask, **{**kwargs, "position_ids": None})[0]
    return out


# The same in every step.
_scaling = functools.lru_cache(maxsize=64)(Scaling)


class _NoGradient(torch.autograd.Function):
    """Answers that a caller may use, and through which no gradient is passed on in silence."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise InputError(
            "kvote is for inference and passes no gradients on; run the model under torch.no_grad(), or train with "
            "another cache."
        )


def _eager_of(module: torch.nn.Module) -> Any:
    """The eager attention of the file in which the class of ``module``, or one that it inherits from, is written."""
    for kind in type(module).__mro__:
        eager = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    return None


def _check(
    module: torch.nn.Module,
    attention_mask: Tensor | None,
    padding: Padding | None,
    kwargs: dict[str, Any],
    *,
    windowed: bool,
) -> None:
    """Raises UnsupportedModelError for what kvote's attention has not, InputError for attention weights. ``windowed``:
    rows of a batch whose own native layers attend, to which a window may be passed on."""
    custom = attention_mask is not None and padding is None
    asked = kwargs.get
    if custom or asked("dropout") or any(asked(name) is not None for name in _REFUSED if name in kwargs):
        refused = [name for name in _REFUSED if asked(name) is not None and not (windowed and name == "sliding_window")]
        refused += ["dropout"] * bool(asked("dropout")) + ["a custom attention mask"] * custom
        if refused:
            asks = f"{type(module).__name__} asks attention for {', '.join(refused)}"
            raise UnsupportedModelError(f"{asks}; kvote has none.")
    collected = _collected.get()
    if asked("output_attentions") or (collected and "attentions" in collected):
        raise InputError("kvote returns no attention weights; leave output_attentions out, or use another cache.")


def _positions(module: torch.nn.Module, owner: CacheLayer | RowsLayer, positions: Tensor | None) -> Tensor | None:
    """The positions [1 or b, t] of the new tokens; None where the model does not tell, and nothing is rotated.

    Raises UnsupportedModelError where the method has to know and cannot.
    """
    needed = owner.needs_positions
    if owner.rotary is not None:
        positions = owner.rotary.positions()
        if positions is None and needed:
            raise UnsupportedModelError(
                f"An image or video gives this text of {type(module).__name__} positions in three dimensions, at which "
                "kvote cannot place tokens anew; use a method that leaves keys as they are, such as 'dense'."
            )
    if positions is None and needed:
        raise UnsupportedModelError(f"{type(module).__name__} does not tell attention its positions; use 'dense'.")
    if positions is not None and positions.dim() != 2:
        if needed:
            raise UnsupportedModelError(
                f"{type(module).__name__} uses {positions.dim()}-D positions; kvote needs one each."
            )
        positions = None
    return positions
