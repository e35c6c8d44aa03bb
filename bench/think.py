"""One decode step of one layer with ThinK against kvote's dense decode, at several lengths. Rounds alternate, medians.

Geometry of Llama-3.1-8B: 32 query heads, 8 key heads, head size 128, bfloat16. Reading 77 of 128 key channels and all
values is 80% of the bytes.
"""

import argparse
from functools import partial
from statistics import median

import torch

from kvote.layer import Layer, Step
from kvote.measure.clock import once
from kvote.settling import compress
from kvote.spec import parse
from kvote.store.segment import Scaling
from kvote.tokens import Queries

HEADS, KV_HEADS, DIM = 32, 8, 128


def step(count: int, seen: int, prompt_left: int | None) -> Step:
    made = {name: torch.randn(1, h, count, DIM).bfloat16() for name, h in (("query", HEADS), ("key", KV_HEADS))}
    places = torch.arange(seen, seen + count)[None]
    value = torch.randn(1, KV_HEADS, count, DIM).bfloat16()
    return Step(
        **made,
        value=value,
        positions=places,
        valid=None,
        tail_queries=1,
        scaling=Scaling(DIM**-0.5),
        prompt_left=prompt_left,
    )


def filled(method: str, tokens: int) -> Layer:
    """A layer as it is after a prompt; the attention of the prompt itself is not computed."""
    layer = Layer(0, parse(method), None)
    made = step(tokens, 0, 0)
    segment = layer.start(made)
    segment.append([0], made.key, made.value, made.positions)
    segment.observe_queries(Queries(made.query), [0], 0)
    layer.seen = tokens
    compress(layer)
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    evicted = torch.zeros(1 << 26)
    print(f"{torch.get_num_threads()} threads\n\n| tokens | dense ms | think ms | dense / think | bytes |")
    print("|---|---|---|---|---|")
    with torch.no_grad():
        for tokens in args.tokens:
            layers = {name: filled(name, tokens) for name in ("dense", "think")}
            times: dict[str, list[float]] = {name: [] for name in layers}
            for _ in range(args.rounds):
                for name, layer in layers.items():
                    made = step(1, layer.seen, None)
                    times[name].append(1000 * once(partial(layer.attend, made), partial(evicted.add_, 1)))
            dense, think = (median(times[name]) for name in layers)
            share = layers["think"].nbytes / layers["dense"].nbytes
            print(f"| {tokens:,} | {dense:.2f} | {think:.2f} | {dense / think:.2f} | {share:.2f} |")


if __name__ == "__main__":
    main()
