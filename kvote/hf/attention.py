"""The attention function: kvote's layers attend by themselves, keys of other caches go to the native function."""

import sys
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvote.errors import UnsupportedModelError
from kvote.heads import HeadGroups
from kvote.hf.cache_layer import Turn, owner_of
from kvote.hf.mask import padding_of
from kvote.layer import Layer, Step
from kvote.store.segment import Logits

_DRAFTS = 32


def attention(
    native: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function. Layers of other caches (sliding ones of a hybrid model, say) go to ``native``."""
    padding = padding_of(attention_mask)
    owner = owner_of(key)
    if owner is None:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(native, eager)
        mask = attention_mask if padding is None else padding.native_mask()
        return attend(module, query, key, value, mask, **kwargs)
    owner.pending = False
    refused = [name for name in ("position_bias", "sliding_window", "cache") if kwargs.get(name) is not None]
    if kwargs.get("dropout"):
        refused.append("dropout")
    if attention_mask is not None and padding is None:
        refused.append("a custom attention mask")
    if refused:
        raise UnsupportedModelError(f"{type(module).__name__} asks attention for {', '.join(refused)}; kvote has none.")
    t, seen = query.shape[2], owner.layer.seen
    positions = kwargs.get("position_ids")
    if positions is None and owner.layer.method.needs_rope:
        raise UnsupportedModelError(f"{type(module).__name__} does not tell attention its positions; use 'dense'.")
    if positions is None:
        positions = torch.arange(seen, seen + t, device=query.device)[None]
    if positions.dim() != 2:
        raise UnsupportedModelError(
            f"{type(module).__name__} uses {positions.dim()}-D positions; kvote needs one each."
        )
    scaling = kwargs.get("scaling")
    step = Step(
        query=query,
        key=key,
        value=value,
        positions=positions.expand(query.shape[0], -1),
        valid=None if padding is None or padding.valid is None else padding.valid.to(query.device),
        solo=_solo(owner.layer, owner.turn, t),
        decode=t == 1 and seen >= owner.turn.end,
        ahead=_ahead(owner.layer, owner.turn, t),
        past=None if padding is None or padding.past is None else padding.past.to(query.device),
        logits=Logits(query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("softcap")),
        sink_logits=kwargs.get("s_aux"),
    )
    return owner.layer.attend(step), None


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
