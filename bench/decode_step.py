"""One decode step of one layer: kvote's CPU kernels against what transformers does (sdpa), alternating in one run.

Geometry of Llama-3.1-8B: 32 query heads, 8 key heads, head size 128, bfloat16. Dense and exact selection are first
checked against the float32 reference on the same numbers; if one is wrong there are no figures. Ratios are medians of
alternating rounds. kvote's times include storing the new token and rolling it back; sdpa gets its cache ready made.

    python bench/decode_step.py --tokens 4096 16384 65536 131072
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from common import save, table
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvote import kernels
from kvote.kernels import reference
from kvote.layer import Layer, Step
from kvote.methods import dense, tokenselect
from kvote.rope import Rope
from kvote.store.segment import Logits

HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5


class _Geometry(torch.nn.Module):
    """What sdpa_attention_forward asks of an attention module."""

    num_key_value_groups = HEADS // KV_HEADS
    is_causal = True


def rotary(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Llama's rotary embedding, base 500,000."""
    inverse = 1.0 / 500_000 ** (torch.arange(0, DIM, 2).float() / DIM)
    angles = positions[..., None].float() * inverse
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def bandwidth() -> float:
    """Bytes per second that this machine reads (sum over 1 GiB), the ceiling of everything below."""
    data = torch.ones(1 << 28)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - begin)
    return data.nbytes / min(times)


def filled(method: Any, key: Tensor, value: Tensor) -> Layer:
    """A layer that holds ``key`` and ``value`` as if they had been prefilled."""
    layer = Layer(0, method, Rope(rotary))
    n = key.shape[2]
    step = Step(key[:, :, :1].repeat_interleave(4, 1), key, value, torch.arange(n)[None], None, 0, Logits(SCALE))
    segment = layer.start(step)
    raw = key if segment.rope is None else segment.rope.undo(key, segment.rope.angles(step.positions, key.dtype))
    segment.append([0], raw, value, step.positions)
    layer.seen = n
    return layer


def stepper(layer: Layer, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """One decode step on ``layer``, rolled back each time so that every call sees the same cache."""
    n = layer.seen
    step = Step(query, key, value, torch.tensor([[n]]), None, 1, Logits(SCALE), decode=True)

    def run() -> Tensor:
        out = layer.attend(step)
        layer.crop(1)
        return out

    return run


def agreement(layer: Layer, n: int) -> float:
    """Share of the reference's winners that the kernels pick too, for one random query. Random keys nearly tie."""
    segment, query = layer.segment, torch.randn(1, HEADS, 1, DIM)
    assert segment is not None
    first, last, top_k = 128, n - 512, min(2048, (n - 640) // 2)
    mine = kernels.top_k(segment.votes(query, [0], first, [last]), top_k)
    logits = reference.scores(query, segment.decode([0], first, last)[0])
    law = reference.top_k(reference.soft_votes(logits), top_k)
    return len(set(mine[0, 0].tolist()) & set(law[0, 0].tolist())) / top_k


def timed(run: Callable[[], Any], seconds: float = 0.3) -> float:
    """Seconds of one call, the median of as many as fit."""
    times: list[float] = []
    while sum(times) < seconds and len(times) < 200:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return median(times)


def measure(n: int, rounds: int, read: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    key, value = torch.randn(2, 1, KV_HEADS, n, DIM).to(torch.bfloat16)
    query, new_key, new_value = (torch.randn(1, h, 1, DIM).to(torch.bfloat16) for h in (HEADS, KV_HEADS, KV_HEADS))
    full_key, full_value = torch.cat([key, new_key], 2), torch.cat([value, new_value], 2)
    module = _Geometry()
    runs: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: sdpa_attention_forward(module, query, full_key, full_value, None, scaling=SCALE)
    }
    layers = {
        "kvote dense": filled(dense(), key, value),
        "tokenselect": filled(tokenselect(theta=2.0), key, value),
        "tokenselect int8": filled(tokenselect(theta=2.0, sketch="int8"), key, value),
    }
    exact = reference.attend(query, full_key, full_value, scale=SCALE)[0].transpose(1, 2).float()
    for name, layer in layers.items():
        runs[name] = stepper(layer, query, new_key, new_value)
    error = (runs["kvote dense"]().float() - exact).abs().max().item()
    if error > 2e-2:
        raise SystemExit(f"kvote dense is wrong by {error}; no figures.")
    share = agreement(layers["tokenselect"], n)
    if share < 0.97:
        raise SystemExit(f"tokenselect picks only {100 * share:.1f}% of the reference's tokens; no figures.")
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timed(run))
    base = median(times["sdpa"])
    held = 2 * KV_HEADS * DIM * 2 * n
    return [
        {
            "tokens": n,
            "kernel": name,
            "ms": 1000 * median(spent),
            "spread_ms": [1000 * min(spent), 1000 * max(spent)],
            "ratio": base / median(spent),
            "read_share": held / median(spent) / read if name in ("sdpa", "kvote dense") else None,
        }
        for name, spent in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with torch.no_grad():
        read = bandwidth()
        results = [row for n in options.tokens for row in measure(n, options.rounds, read)]
    rows = [
        [
            r["kernel"],
            f"{r['tokens']:,}",
            f"{r['ms']:.3f}",
            f"{r['ratio']:.1f}x",
            "" if r["read_share"] is None else f"{100 * r['read_share']:.0f}%",
        ]
        for r in results
    ]
    print(f"read bandwidth {read / 1e9:.1f} GB/s")
    print(table(["kernel", "tokens", "ms", "ratio to sdpa", "of the bandwidth"], rows))
    save("decode_step", {"geometry": [HEADS, KV_HEADS, DIM], "read_bandwidth": read, "results": results})


if __name__ == "__main__":
    main()
