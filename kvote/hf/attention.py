"""The attention function: kvote's layers attend by themselves, keys of other caches go to the native function."""

import functools
import sys
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import output_capturing

from kvote.errors import InputError, UnsupportedModelError
from kvote.heads import HeadGroups
from kvote.hf.cache_layer import CacheLayer, Turn, owner_of
from kvote.hf.compiling import uncompiled
from kvote.hf.mask import Padding, padding_of
from kvote.hf.watch import note_attention
from kvote.layer import Layer, Step
from kvote.store.segment import Logits

_DRAFTS = 32
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
    owner.pending = False
    _check(module, attention_mask, padding, kwargs)
    # Kernels read rows of channels.
    if query.stride(-1) != 1 or key.stride(-1) != 1 or value.stride(-1) != 1:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    t, seen = query.shape[2], owner.layer.seen
    positions = _positions(module, owner, kwargs.get("position_ids"))
    if positions is None:
        positions = torch.arange(seen, seen + t, device=query.device)[None]
    scaling = kwargs.get("scaling")
    step = Step(
        query=query,
        key=key,
        value=value,
        positions=positions if len(positions) == len(query) else positions.expand(len(query), -1),
        valid=None if padding is None or padding.valid is None else padding.valid.to(query.device),
        solo=_solo(owner.layer, owner.turn, t),
        decode=t == 1 and seen >= owner.turn.end,
        ahead=_ahead(owner.layer, owner.turn, t),
        past=None if padding is None or padding.past is None else padding.past.to(query.device),
        logits=_logits(query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("softcap")),
        sink_logits=kwargs.get("s_aux"),
    )
    # Model files go on with .view(), which needs what transformers' own functions return: contiguous answers.
    out = owner.layer.attend(step).contiguous()
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)) and not out.requires_grad:
        out = _NoGradient.apply(out, query, key, value)  # type: ignore[no-untyped-call]
    return out, None


# The same in every step.
_logits = functools.lru_cache(maxsize=64)(Logits)


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
    module: torch.nn.Module, attention_mask: Tensor | None, padding: Padding | None, kwargs: dict[str, Any]
) -> None:
    """Raises UnsupportedModelError for what kvote's attention has not, InputError for attention weights."""
    custom = attention_mask is not None and padding is None
    asked = kwargs.get
    if custom or asked("dropout") or any(asked(name) is not None for name in _REFUSED if name in kwargs):
        refused = [name for name in _REFUSED if asked(name) is not None]
        refused += ["dropout"] * bool(asked("dropout")) + ["a custom attention mask"] * custom
        raise UnsupportedModelError(f"{type(module).__name__} asks attention for {', '.join(refused)}; kvote has none.")
    collected = _collected.get()
    if asked("output_attentions") or (collected and "attentions" in collected):
        raise InputError("kvote returns no attention weights; leave output_attentions out, or use another cache.")


def _positions(module: torch.nn.Module, owner: CacheLayer, positions: Tensor | None) -> Tensor | None:
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


def _solo(layer: Layer | HeadGroups, turn: Turn, t: int) -> int:
    """How many of the next ``t`` columns belong to the tail of a prompt or turn, or come after it."""
    tail = layer.method.read.tail
    if layer.seen < turn.end:
        return max(0, min(t, layer.seen + t - turn.end + (0 if turn.question_follows else tail)))
    if layer.record_past:
        # Assisted decoding verifies drafts as the decode steps they stand for; its first pass has them behind a prompt.
        return t if layer.seen else min(t, tail + _DRAFTS)
    return t if t == 1 else min(t, tail)


def _ahead(layer: Layer | HeadGroups, turn: Turn, t: int) -> int | None:
    """How many tokens of the prompt come after the next ``t`` columns; None if those are generated ones.

    Without an announcement, the end of every pass is a prompt's end, unless it is a single token or verifies drafts.
    """
    if layer.seen < turn.end:
        return turn.end - layer.seen - t
    drafts = layer.record_past and t <= _DRAFTS
    return None if layer.seen and (t == 1 or drafts) else 0
