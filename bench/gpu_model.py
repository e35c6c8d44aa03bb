"""A whole model in the shape of Llama-3.1-8B, random weights, through ``generate()``: the default cache and kvote's."""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from common import TokenClock
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaConfig

import kvote
from kvote.layer import Step
from kvote.store.segment import Scaling

METHODS = ("dense", "tokenselect(theta=2.0)", "tokenselect(theta=2.0, sketch='int8')", "tokenselect(theta=-1.0)")
SMALL = "tokenselect(top_k=8, sinks=4, window=16, chunk=16, theta=2.0)"
NEW = 24
# What the rounding of 32 layers in bfloat16 may add up to in the logits, relative to their norm.
TOLERANCE = 0.05
_PASS = 8192


def build(device: torch.device, tiny: bool) -> Any:
    shape = (64, 128, 2, 4, 2, 16, 256) if tiny else (4096, 14336, 32, 32, 8, 128, 128_256)
    hidden, intermediate, layers, heads, kv_heads, dim, words = shape
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        max_position_embeddings=1 << 20,
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    # Random weights end a text at random.
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model


def random_tokens(config: Any, layer: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys and values [1, kv_heads, tokens, dim] of a layer, the same for every cache."""
    generator = torch.Generator(device).manual_seed(layer)
    shape = 2, 1, config.num_key_value_heads, tokens, config.head_dim
    key, value = torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)
    return key, value


def default_cache(model: Any, tokens: int) -> Any:
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        cache.update(*random_tokens(model.config, layer, tokens, model.device), layer)
    return cache


def kvote_cache(model: Any, method: str, tokens: int) -> Any:
    """A cache that holds the same tokens as if a prompt of that length had been announced and prefilled."""
    model.set_attn_implementation("sdpa")
    cache = kvote.Cache(model, method)
    cache.expect(tokens)
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for number, layer in enumerate(cache.managed):
        keys, values = random_tokens(model.config, number, tokens, model.device)
        for start in range(0, tokens, _PASS):
            key, value = (x[:, :, start : start + _PASS] for x in (keys, values))
            positions = torch.arange(start, start + key.shape[2], device=model.device)[None]
            query = key[:, :, :1].repeat_interleave(groups, 1)
            segment = layer.start(Step(query, key, value, positions, None, 0, Scaling(key.shape[-1] ** -0.5)))
            raw = key if segment.rope is None else segment.rope.undo(key, segment.rope.angles(positions, key.dtype))
            segment.append([0], raw, value, positions)
        layer.seen = tokens
    return cache


def generate(model: Any, cache: Any, ids: Tensor, attention: str) -> tuple[Tensor, list[float]]:
    """First logits and milliseconds per token."""
    model.set_attn_implementation(attention)
    clock = TokenClock()
    answer = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=NEW if ids.is_cuda else 5,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        streamer=clock,
    )
    # Kernels are compiled in the first tokens.
    return answer.logits[0].float(), [1000 * seconds for seconds in clock.steps[3:]]


def model_rows(device: torch.device, tiny: bool, tokens: int, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """(e) Milliseconds per generated token. The exact cache is checked against the default one's logits."""
    tokens = 64 if tiny else tokens
    model = build(device, tiny)
    ids = torch.randint(model.config.vocab_size, (1, tokens + 1), device=device)
    say("default cache")
    cache = default_cache(model, tokens)
    law, base = generate(model, cache, ids, "sdpa")
    yield _row(tokens, "DynamicCache, sdpa", base, base, device)
    del cache
    for method in ("dense", SMALL) if tiny else METHODS:
        say(f"kvote {method}")
        cache = kvote_cache(model, method, tokens)
        logits, spent = generate(model, cache, ids, model.config._attn_implementation)
        error = float((logits - law).norm() / law.norm())
        if method == "dense" and not error <= TOLERANCE:
            raise RuntimeError(f"The model's logits are off by {error:.2g} with kvote's dense cache; no figures.")
        yield _row(tokens, f"kvote {method}", spent, base, device)
        del cache
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _row(tokens: int, name: str, spent: list[float], base: list[float], device: torch.device) -> dict[str, Any]:
    timed = device.type == "cuda"
    return {
        "part": "e model, ms per token",
        "tokens": f"{tokens:,}",
        "kernel": name,
        "ms": median(spent) if timed else None,
        "least_ms": min(spent) if timed else None,
        "most_ms": max(spent) if timed else None,
        "ratio": median(base) / median(spent) if timed else None,
        "share_of_copy": None,
        "paper_ratio": None,
    }
