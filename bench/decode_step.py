"""One decode step of one layer: kvote's CPU kernels against torch's sdpa, from 4,096 to 262,144 tokens in the cache.

Geometry of Llama-3.1-8B: 32 query heads, 8 key heads, head size 128, bfloat16. The table of every length is that of
``kvote bench``: every kernel is checked against the float32 reference first (if one is wrong there are no figures),
rounds alternate, and all of the caches is evicted before each call. The baseline is sdpa called in the strongest way
there is (query heads of a key head packed as rows); the way transformers calls it is a row of its own.

With --replay, the decisions of the selection cache that bench/reuse.py recorded on the embedded model are replayed: a
hit repeats the last selecting query, a miss is a new one.

    python bench/reuse.py
    python bench/decode_step.py --replay
"""

import argparse
import json
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

import matplotlib
import torch
from common import RESULTS, save, table

from kvote.layer import Layer
from kvote.measure.clock import once
from kvote.measure.geometry import Geometry
from kvote.measure.kernels import Table, measure
from kvote.measure.sweep import Sweep
from kvote.measure.workload import BASELINE
from kvote.methods import tokenselect

matplotlib.use("Agg")
import matplotlib.pyplot as plt

THETA = 0.9
LINES = {
    "dense decode": "kvote dense",
    "tokenselect step": "TokenSelect, exact scores",
    "tokenselect step, 8-bit sketch": "TokenSelect, 8-bit sketch",
    "tokenselect step, 4-bit sketch": "TokenSelect, 4-bit sketch",
}


def ratios(tables: list[Table], kernel: str) -> list[float]:
    return [next(row.ratio for row in t.rows if row.kernel == kernel) for t in tables]


def break_even(tables: list[Table], kernel: str) -> float | None:
    """Tokens from which on the kernel beats the baseline, between the lengths measured on a straight line."""
    points = list(zip([t.tokens for t in tables], ratios(tables, kernel), strict=True))
    if points[-1][1] < 1:
        return None
    for (a, below), (b, above) in reversed(list(pairwise(points))):
        if below < 1 <= above:
            return a + (b - a) * (1 - below) / (above - below)
    return float(points[0][0])


def picture(tables: list[Table], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2))
    tokens = [t.tokens for t in tables]
    for kernel, label in LINES.items():
        axes.plot(tokens, ratios(tables, kernel), marker="o", label=label)
    axes.axhline(1, color="grey", linewidth=1, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="times faster than sdpa, packed")
    axes.set_xticks(tokens, [f"{t // 1024}K" for t in tokens], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_yticks([0.5, 1, 2, 5, 10, 20], ["0.5x", "1x", "2x", "5x", "10x", "20x"])
    axes.set_title("One decode step of one layer, 8B geometry")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def replayed(geometry: Geometry, tokens: int, decisions: str, sketch: str, sweep: Sweep) -> dict[str, Any]:
    """Milliseconds per step of a layer with the selection cache on, beside the baseline, alternating step by step."""
    key, value = geometry.tokens(tokens)
    layer: Layer = geometry.filled(tokenselect(theta=THETA, sketch=sketch), key, value)
    last, hits, misses, base = geometry.step(tokens), [], [], []
    for decision in decisions:
        step = geometry.step(layer.seen)
        last = step if decision == "m" else last
        again = type(step)(**{**vars(step), "query": last.query})
        # The rotation of the step moves with its position; what is compared is the query before it.
        assert layer.segment is not None
        assert layer.segment.rope is not None
        raw = layer.segment.rope.undo(last.query, layer.segment.rope.angles(last.positions, geometry.dtype))
        cos, sin = layer.segment.rope.angles(step.positions, geometry.dtype)
        rotated = layer.segment.rope.apply(raw, (cos[:, None], sin[:, None]))
        again = type(step)(**{**vars(step), "query": rotated})
        reused = layer.activity.reused
        seconds = once(partial(layer.attend, again), sweep)
        (hits if layer.activity.reused > reused else misses).append(seconds)
        base.append(once(geometry.packed(step.query, key, value), sweep))
    spent = mean(hits + misses)
    return {
        "sketch": sketch,
        "hit_rate": len(hits) / len(decisions),
        "ms": 1000 * spent,
        "hit_ms": 1000 * median(hits) if hits else None,
        "miss_ms": 1000 * median(misses) if misses else None,
        "sdpa_ms": 1000 * median(base),
        "ratio": median(base) / spent,
        "ratio_of_a_hit": median(base) / median(hits) if hits else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096 << i for i in range(7)])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--replay", action="store_true", help="replay the decisions of bench/results/reuse.json")
    parser.add_argument("--replay-tokens", type=int, default=131_072)
    options = parser.parse_args()
    geometry, sweep = Geometry(), Sweep()
    with torch.no_grad():
        tables = [measure(geometry, n, sweep, options.rounds, say=print) for n in options.tokens]
        replays: list[dict[str, Any]] = []
        if options.replay:
            recorded = json.loads((RESULTS / "reuse.json").read_text())["results"]
            layers = next(r["decisions"] for r in recorded if r["theta"] == THETA)
            sweep.samples.clear()
            # The layers of the model one after the other, each for the same number of steps.
            told = "".join(layer[:64] for layer in layers)
            replays = [replayed(geometry, options.replay_tokens, told, s, sweep) for s in ("int8", "int4")]
    for t in tables:
        rows = [
            [
                row.kernel,
                f"{row.ms:.3f}",
                f"{row.shortest_ms:.3f} to {row.longest_ms:.3f}",
                f"{row.ratio:.1f}x",
                "" if row.gb_per_s is None else f"{row.gb_per_s:.1f}",
                "" if row.share is None else f"{100 * row.share:.0f}%",
            ]
            for row in t.rows
        ]
        print(f"\n{t.tokens:,} tokens; read bandwidth {t.bandwidth:.1f} GB/s")
        print(table(["kernel", "ms", "spread", "ratio to sdpa packed", "GB/s", "of the bandwidth"], rows))
    edges = {kernel: break_even(tables, kernel) for kernel in LINES}
    print("\nbreak-even:", {k: None if v is None else round(v) for k, v in edges.items()})
    for replay in replays:
        print("selection cache, replayed:", {k: round(v, 2) if isinstance(v, float) else v for k, v in replay.items()})
    if len(tables) > 1:
        picture(tables, RESULTS / "decode_step.png")
    save(
        "decode_step",
        {
            "baseline": BASELINE,
            "tables": [asdict(t) for t in tables],
            "break_even": edges,
            "selection_cache": {"theta": THETA, "tokens": options.replay_tokens, "replays": replays},
        },
    )


if __name__ == "__main__":
    main()
