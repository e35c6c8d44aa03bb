"""What it costs to decode eight caches in one batch, against one by one and against one cache of eight sequences.

A small Llama of random weights; every cache holds 64 tokens. All three are timed in turn in one run and cropped back
outside the clock.

    python bench/rows.py
"""

import argparse
import time
from statistics import median
from typing import Any

import torch
from common import table
from transformers import LlamaConfig, LlamaForCausalLM

import kvote

TOKENS, MEMBERS, STEPS = 64, 8, 4


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--method", default="dense")
    parser.add_argument("--hidden", type=int, default=512)
    given = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=given.hidden,
        intermediate_size=4 * given.hidden,
        num_hidden_layers=8,
        num_attention_heads=max(2, given.hidden // 64),
        num_key_value_heads=2,
    )
    net = LlamaForCausalLM(config).eval()
    prompts = torch.randint(0, 256, (MEMBERS, TOKENS))
    batch, single = kvote.Cache(net, given.method), [kvote.Cache(net, given.method) for _ in range(MEMBERS)]
    rows, ids = kvote.Rows(net), torch.ones(MEMBERS, 1, dtype=torch.int64)
    with torch.no_grad():
        net(input_ids=prompts, past_key_values=batch)
        for i, cache in enumerate(single):
            net(input_ids=prompts[i : i + 1], past_key_values=cache)
            rows.join(cache)
    seconds: dict[str, list[float]] = {"rows": [], "one by one": [], "one cache of 8": []}
    for _ in range(given.rounds):
        for name, own in seconds.items():
            own.append(_steps(net, name, rows, single, batch, ids))
    base = median(seconds["rows"])
    print(
        table(
            ["way", "ms a step of 8 tokens", "rows take of it"],
            [[name, f"{1000 * median(own):.2f}", f"{base / median(own):.2f}x"] for name, own in seconds.items()],
        )
    )


@torch.no_grad()
def _steps(net: Any, way: str, rows: kvote.Rows, single: list[kvote.Cache], batch: kvote.Cache, ids: Any) -> float:
    """Seconds of a step in which each of the sequences goes on by a token."""
    begin = time.perf_counter()
    for _ in range(STEPS):
        if way == "rows":
            net(**rows.inputs(list(ids)))
        elif way == "one by one":
            for i, cache in enumerate(single):
                net(input_ids=ids[i : i + 1], past_key_values=cache)
        else:
            net(input_ids=ids, past_key_values=batch)
    seconds = (time.perf_counter() - begin) / STEPS
    for cache in [batch] if way == "one cache of 8" else single:
        cache.crop(-STEPS)
    return seconds


if __name__ == "__main__":
    main()
