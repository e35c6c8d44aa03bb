"""The arguments that a model gives transformers' attention, found out by one pass on torch's meta device, without
weights."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

_NAME, _TOKENS = "kvote_shape_trial", 4


@dataclass(frozen=True)
class Call:
    """One call of attention: of which layer (None where its module does not say), heads and channels of queries, keys
    and values, and whether a query is kept from seeing what follows it."""

    layer: int | None
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    causal: bool


@dataclass
class Trial:
    """The ``calls`` of one pass, and why it ended early, None where it did not."""

    calls: list[Call] = field(default_factory=list)
    ended: Exception | None = None


def attention_calls(model: Any) -> Trial:
    """Runs the decoder of a ``model`` on the meta device. Models that look at numbers on the way cannot be run there to
    their end; what they called before is known all the same."""
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="meta")
    # Without a cache, masks depend on what the positions are, which are nothing here; some models take none.
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    trial = _run(model, {"input_ids": ids, "past_key_values": cache, "use_cache": True})
    if trial.calls or trial.ended is None:
        return trial
    other = _run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False})
    return other if other.calls or other.ended is None else trial


def _run(model: Any, given: dict[str, Any]) -> Trial:
    trial = Trial()
    AttentionInterface.register(_NAME, partial(_record, trial))
    AttentionMaskInterface.register(_NAME, _no_mask)
    try:
        model.eval().set_attn_implementation(_NAME)
        with torch.device("meta"), torch.no_grad():
            model.get_decoder()(**given)
    except Exception as error:
        trial.ended = error
    finally:
        # The interface would keep the trial alive.
        AttentionInterface.register(_NAME, _record)
    return trial


def _record(
    trial: Trial, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """Stands in for attention: query [b, heads, t, d], key and value [b, kv_heads, n, d]; out [b, t, heads, dv]."""
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    layer = getattr(module, "layer_idx", None)
    trial.calls.append(Call(layer, query.shape[1], key.shape[1], query.shape[3], value.shape[3], bool(causal)))
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _no_mask(*args: Any, **given: Any) -> None:
    return None
