"""Tiny random models of every family, and the few ways in which tests feed them."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import kvote

VOCABULARY = 256
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

# family: (model type, what differs from the common configuration)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": None}),
    "phi3": ("phi3", {}),
    "phi3-partial": ("phi3", {"rope_parameters": {**_ROPE, "partial_rotary_factor": 0.5}}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 24, **_ALTERNATING}),
    "olmo2": ("olmo2", {}),
    "gpt-oss": (
        "gpt_oss",
        {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": _ROPE, **_ALTERNATING},
    ),
    "cohere": ("cohere", {"logit_scale": 1.0}),
}


@functools.cache
def _weights(family: str, seed: int, changes: Any) -> PreTrainedModel:
    model_type, own = FAMILIES[family]
    changes = {**own, **_thawed(changes)}
    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            # Large enough for attention to be peaked, so that a wrong token or position shows.
            "initializer_range": 1.6 / changes.get("hidden_size", 64) ** 0.5,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
            **changes,
        },
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def _frozen(value: Any) -> Any:
    """Lists and dicts as something that can be a cache key."""
    if isinstance(value, dict):
        return "dict", tuple((name, _frozen(inner)) for name, inner in sorted(value.items()))
    return ("list", tuple(value)) if isinstance(value, list) else value


def _thawed(value: Any) -> Any:
    match value:
        case ("dict", inner):
            return {name: _thawed(each) for name, each in inner}
        case ("list", inner):
            return list(inner)
    return value


def model(family: str = "llama", *, native: str | None = None, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model with transformers' own attention (``native``); weights are made once per test process."""
    made = _weights(family, seed, _frozen(changes))
    made.set_attn_implementation(native or ("eager" if family == "gpt-oss" else "sdpa"))
    return made


def ids(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random tokens without specials; none comes twice in a row if there are enough (equal keys tie in a vote)."""
    generator = torch.Generator().manual_seed(seed)
    if columns > VOCABULARY - 3:
        return torch.randint(3, VOCABULARY, (rows, columns), generator=generator)
    return torch.stack([3 + torch.randperm(VOCABULARY - 3, generator=generator)[:columns] for _ in range(rows)])


def padded(rows: int, columns: int, pads: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens with ``pads`` columns of left padding, and their mask."""
    tokens, mask = ids(rows, columns, seed), torch.ones(rows, columns, dtype=torch.long)
    for row, count in enumerate(pads):
        tokens[row, :count], mask[row, :count] = 0, 0
    return tokens, mask


def feed(net: PreTrainedModel, cache: Any, tokens: Tensor, mask: Tensor | None = None, passes: int = 0) -> Tensor:
    """Logits [rows, columns, vocabulary] of ``tokens``, fed ``passes`` columns at a time (0: in one pass).

    ``mask`` covers what the cache has seen too.
    """
    size = passes or tokens.shape[1]
    seen = 0 if cache is None else int(cache.get_seq_length())
    out = []
    with torch.no_grad():
        for start in range(0, tokens.shape[1], size):
            piece = tokens[:, start : start + size]
            stop = seen + start + piece.shape[1]
            kwargs: dict[str, Any] = {}
            if mask is not None:
                places = (mask.cumsum(-1) - 1).clamp(min=0)
                kwargs = {"attention_mask": mask[:, :stop], "position_ids": places[:, seen + start : stop]}
            out.append(net(input_ids=piece, past_key_values=cache, use_cache=cache is not None, **kwargs).logits)
    return torch.cat(out, dim=1)


def generate(net: PreTrainedModel, tokens: Tensor, cache: Any = None, mask: Tensor | None = None, **kwargs: Any) -> Any:
    """Greedy unless told otherwise, always ``max_new_tokens`` long, with the logits of each step."""
    settings = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    mask = torch.ones_like(tokens) if mask is None else mask
    with torch.no_grad():
        return net.generate(tokens, attention_mask=mask, past_key_values=cache, **{**settings, **kwargs})


def cache(net: PreTrainedModel, method: str | Callable[[PreTrainedModel], kvote.Method] = "dense") -> kvote.Cache:
    """``method``: a spec, or what builds a method for the model."""
    return kvote.Cache(net, method if isinstance(method, str) else method(net))
