"""Published readers as their own code has them: dense attention with a mask, computed by transformers' cache."""

from collections.abc import Callable
from typing import Any

import tiny
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

# From a layer's index, its logits [b, heads, 1, n] and rotated query and keys [b, heads, ..., d] to the mask of what a
# generated token sees, or None for everything.
Masking = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]


def model(groups: int = 2, layers: int = 4) -> PreTrainedModel:
    """Two key heads of 16 channels, with ``head_groups`` query heads each."""
    heads = 2 * groups
    return tiny.model(num_hidden_layers=layers, hidden_size=16 * heads, num_attention_heads=heads, head_dim=16)


def run(net: PreTrainedModel, method: Any, rows: int = 2, *, prompt: int, steps: int) -> tuple[Any, Tensor]:
    """The cache after a prompt and some generated tokens, and the logits of these."""
    cache, tokens = tiny.cache(net, method), tiny.ids(rows, prompt + steps)
    tiny.feed(net, cache, tokens[:, :prompt])
    return cache, tiny.feed(net, cache, tokens[:, prompt:], passes=1)


def top(logits: Tensor, k: int) -> Tensor:
    """The mask of the k largest."""
    return torch.zeros(logits.shape, dtype=torch.bool).scatter(-1, logits.topk(min(k, logits.shape[-1])).indices, True)


def decoded(net: PreTrainedModel, tokens: Tensor, prompt: int, mask: Masking) -> Tensor:
    """Logits [b, steps, vocabulary] of the tokens after the prompt, fed one by one."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, causal: Any, **kwargs: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        t, n = query.shape[2], key.shape[2]
        logits = query @ key.transpose(-1, -2) * kwargs["scaling"]
        if t > 1:
            late = torch.arange(n) > torch.arange(n - t, n)[:, None]
            logits = logits.masked_fill(late, float("-inf"))
        else:
            seen = mask(module.layer_idx, logits, query, key)
            logits = logits if seen is None else logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        return (logits.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("masking", attention)
    net.set_attn_implementation("masking")
    cache = DynamicCache(config=net.config)
    with torch.no_grad():
        net(input_ids=tokens[:, :prompt], past_key_values=cache)
        steps = tokens[:, prompt:].split(1, dim=1)
        out = [net(input_ids=step, past_key_values=cache).logits for step in steps]
    net.set_attn_implementation("sdpa")
    return torch.cat(out, dim=1)
