"""Whether torch.compile makes a decode step with a kvote cache faster: the same model, plain and compiled, in turns.

The model has the shape of SmolLM2-135M with random weights. Its graph breaks at every layer's attention.
"""

import argparse
import time
from statistics import median
from typing import Any

import torch
from common import command, machine, save
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvote

SHAPE = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in the cache")
    parser.add_argument("--layers", type=int, default=30, help="layers of the model; compiling takes long")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each kind")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": args.layers}, dtype=torch.bfloat16))
        .to(torch.bfloat16)
        .eval()
    )
    compiled = torch.compile(model)
    caches = {
        "DynamicCache": lambda: DynamicCache(config=model.config),
        "kvote dense": lambda: kvote.Cache(model, "dense"),
        "kvote tokenselect": lambda: kvote.Cache(model, "tokenselect(top_k=512, sinks=16, window=256)"),
    }
    rows = []
    for name, make in caches.items():
        plain, fast = steps(model, compiled, make, args.tokens, args.rounds)
        rows.append({"cache": name, "plain_ms": plain, "compiled_ms": fast, "ratio": plain / fast})
        print(f"{name}: {plain:.1f} ms plain, {fast:.1f} ms compiled, {plain / fast:.2f}x", flush=True)
    save(
        "compiled",
        {"command": command(), "machine": machine(), "tokens": args.tokens, "layers": args.layers, "rows": rows},
    )


@torch.no_grad()
def steps(model: Any, compiled: Any, make: Any, tokens: int, rounds: int) -> tuple[float, float]:
    """Median milliseconds of a decode step, plain and compiled, in turns."""
    ids = torch.randint(0, SHAPE["vocab_size"], (1, tokens))
    caches = make(), make()
    for cache in caches:
        model(ids, past_key_values=cache)
    took: tuple[list[float], list[float]] = [], []
    for turn in range(rounds + 5):
        for run, cache, times in zip((model, compiled), caches, took, strict=True):
            began = time.perf_counter()
            run(ids[:, turn : turn + 1], past_key_values=cache)
            if turn >= 5:
                times.append(1000 * (time.perf_counter() - began))
    return median(took[0]), median(took[1])


if __name__ == "__main__":
    main()
