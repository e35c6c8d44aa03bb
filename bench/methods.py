"""A decode step of one layer with every method, beside torch's attention and kvote dense, at 32K and 128K tokens.

Geometry of Llama-3.1-8B: 32 query heads, 8 key heads, head size 128, bfloat16. Every method holds the same random
tokens as after a prompt, whose last 64 tokens went through it as a real pass, so that it has dropped or encoded what it
would. Its answer is checked against the law first; if that fails there are no figures for it. Then rounds alternate:
sdpa in the strongest way to call it (query heads of a key head packed as rows), kvote dense, and the method, all of the
caches evicted before each call; sdpa as transformers calls it is timed once per method. Steps are real ones: the token
stays. Where tokens are dropped for it, in bursts, a round is all steps from one drop to the next, and counts with their
mean. Where layers differ (tidaldecode, xkv), a step is their weighted mean.

A stopped run goes on where it was (results/methods.json).

    python bench/methods.py                               # everything
    python bench/methods.py --methods h2o 'snapkv | tokenselect' --tokens 32768
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from common import RESULTS, save, table
from subjects import MadeUp, Subject, built, known

from kvote.heads import HeadGroups
from kvote.layer import Layer
from kvote.measure import check
from kvote.measure.clock import once
from kvote.measure.geometry import Geometry
from kvote.measure.sweep import Sweep
from kvote.method import Method
from kvote.spec import parse

PACKED, AS_IT_COMES, DENSE = "sdpa, packed", "sdpa as transformers calls it", "kvote dense"
# Calls of a round; where generated tokens are dropped, so many at least, and the second number at most.
_CALLS, _MOST_CALLS = 4, 256
# Seconds of a call from which on one does, and of all calls of a method.
_SLOW, _SECONDS = 0.5, 20
# Layers of the made-up model that calibrations are about.
_LAYERS = 32


class Held:
    """The tokens, as torch holds them and in a dense kvote layer."""

    def __init__(self, geometry: Geometry, tokens: int) -> None:
        self.geometry, self.tokens = geometry, tokens
        torch.manual_seed(tokens)
        self.key, self.value = geometry.tokens(tokens)
        self.dense = self.layers(parse("dense"))

    def layers(self, method: Method, count: int = 1) -> list[Layer | HeadGroups]:
        return self.geometry.prefilled(method, self.key, self.value, count)


def stepping(layers: list[Layer | HeadGroups], weights: tuple[float, ...], geometry: Geometry) -> Callable[..., float]:
    """Seconds of one decode step of a layer, the mean of ``layers`` by their ``weights``; each takes the token in."""

    def seconds(before: Callable[[], object]) -> float:
        total = 0.0
        for layer, weight in zip(layers, weights, strict=True):
            total += weight * once(partial(layer.attend, geometry.step(layer.seen)), before)
        return total

    return seconds


def calling(make: Callable[..., Callable[[], torch.Tensor]], held: Held) -> Callable[..., float]:
    """The same for torch's own attention."""
    return partial(once, make(held.geometry.query(), held.key, held.value))


def dropped(layers: list[Layer | HeadGroups]) -> int:
    """Tokens that they have let go of so far."""
    return sum(part.activity.dropped for layer in layers for part in layer.parts)


def from_drop_to_drop(
    call: Callable[..., float], before: Callable[[], object], layers: list[Layer | HeadGroups]
) -> float:
    """Seconds of a step on average, over whole bursts: the step that drops tokens costs what the others save."""
    total, count, ended = 0.0, 0, False
    while count < _CALLS or not ended:
        so_far = dropped(layers)
        total, count = total + call(before), count + 1
        ended = dropped(layers) > so_far or count == _MOST_CALLS
    return total / count


def drops(layers: list[Layer | HeadGroups]) -> bool:
    """Whether they let go of tokens while generating."""
    keepers = [part.method.keep for layer in layers for part in layer.parts]
    return any(keep.offers.drops and keep.offers.drops_generated for keep in keepers)


def measure(subject: Subject, held: Held, sweep: Sweep, rounds: int, made_up: MadeUp) -> dict[str, Any] | str:
    """One method at one length, or why there are no figures."""
    geometry = held.geometry
    spec = subject.at(held.tokens)
    method = built(spec, made_up)
    if isinstance(method, str):
        return method
    begin = time.perf_counter()
    weights = subject.weights
    layers = held.layers(method, len(weights))
    filled = time.perf_counter() - begin
    try:
        for layer in (*layers, *held.dense):
            check.decoding(subject.name, layer, geometry)
    except check.WrongAnswerError as error:
        return str(error)
    calls = {
        PACKED: calling(geometry.packed, held),
        DENSE: stepping(held.dense, (1.0,), geometry),
        subject.name: stepping(layers, weights, geometry),
    }
    as_it_comes = calling(geometry.as_it_comes, held)(sweep)
    first = {name: call(sweep) for name, call in calls.items()}
    # What is slow is called once a round, and for as many rounds as there is time for, two at least.
    each = len(weights) * first[subject.name]
    often, rounds = (_CALLS if each < _SLOW else 1), max(2, min(rounds, int(_SECONDS / each)))
    spent: dict[str, list[float]] = {name: [] for name in calls}
    bursts = drops(layers)
    if bursts:
        # Rounds begin behind a drop.
        from_drop_to_drop(calls[subject.name], lambda: None, layers)
    for _ in range(rounds):
        for name, call in calls.items():
            if name == subject.name and bursts:
                spent[name].append(from_drop_to_drop(call, sweep, layers))
            else:
                spent[name].append(median(call(sweep) for _ in range(often)))
    mine, packed, dense = (spent[name] for name in (subject.name, PACKED, DENSE))
    parts = [part for layer in layers for part in layer.parts]
    # Tokens of the steps: with those of all methods, it would outgrow the memory set aside.
    held.dense[0].crop(held.dense[0].seen - held.tokens)
    return {
        "name": subject.name,
        "spec": spec,
        "tokens": held.tokens,
        "rounds": rounds,
        "ms": 1000 * median(mine),
        "shortest_ms": 1000 * min(mine),
        "longest_ms": 1000 * max(mine),
        "packed_ms": 1000 * median(packed),
        "as_it_comes_ms": 1000 * as_it_comes,
        "dense_ms": 1000 * median(dense),
        # Round by round, so that a machine that slows down in between does not distort them.
        "to_packed": median(b / m for b, m in zip(packed, mine, strict=True)),
        "to_as_it_comes": as_it_comes / median(mine),
        "to_dense": median(b / m for b, m in zip(dense, mine, strict=True)),
        "bytes_per_layer": sum(part.nbytes for part in parts) / len(layers),
        "bytes_to_dense": sum(part.nbytes for part in parts) / len(layers) / held.dense[0].nbytes,
        "dropped": dropped(layers),
        "selections": sum(part.activity.selections for part in parts),
        "reused": sum(part.activity.reused for part in parts),
        "filled_seconds": round(filled, 1),
    }


def render(points: list[dict[str, Any]]) -> str:
    """One table per length."""
    parts = []
    for tokens in sorted({p["tokens"] for p in points}):
        mine = [p for p in points if p["tokens"] == tokens]
        rows = [
            [
                "`" + p["spec"].replace("|", "\\|") + "`",
                f"{p['ms']:.2f}",
                f"{p['shortest_ms']:.2f} to {p['longest_ms']:.2f}",
                f"{p['to_packed']:.1f}x",
                f"{p['to_as_it_comes']:.0f}x",
                f"{p['to_dense']:.2f}x",
                f"{100 * p['bytes_to_dense']:.0f}%",
            ]
            for p in mine
        ]
        head = ["method", "ms", "spread", "times sdpa packed", "times sdpa as called", "times kvote dense", "bytes"]
        base = [f"{median(p[k] for p in mine):.1f} ms" for k in ("packed_ms", "as_it_comes_ms", "dense_ms")]
        told = f"{tokens:,} tokens; sdpa packed {base[0]}, as transformers calls it {base[1]}, kvote dense {base[2]}"
        parts.append(f"{told}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="names as in bench/subjects.py; all by default")
    parser.add_argument("--tokens", nargs="+", type=int, default=[32_768, 131_072])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fresh", action="store_true", help="measure again what has been measured")
    options = parser.parse_args()
    geometry, sweep = Geometry(), Sweep()
    made_up = MadeUp(_LAYERS, geometry.heads, geometry.kv_heads, geometry.dim)
    stored = RESULTS / "methods.json"
    points: list[dict[str, Any]] = json.loads(stored.read_text())["points"] if stored.exists() else []
    subjects, order = known(options.methods), [subject.name for subject in known()]
    for tokens in options.tokens:
        same = [p for p in points if p["tokens"] == tokens and not options.fresh]
        timed = [s for s in subjects if options.methods or s.longest is None or tokens <= s.longest]
        missing = [s for s in timed if all(p["spec"] != s.at(tokens) for p in same)]
        held = Held(geometry, tokens) if missing else None
        for subject in missing:
            assert held is not None
            with torch.no_grad():
                point = measure(subject, held, sweep, options.rounds, made_up)
            if isinstance(point, str):
                print(f"{tokens:>9,} {subject.name}: no figures, {point}", flush=True)
                continue
            points = [p for p in points if (p["name"], p["tokens"]) != (subject.name, tokens)] + [point]
            points.sort(key=lambda p: (p["tokens"], order.index(p["name"]) if p["name"] in order else len(order)))
            save("methods", {"geometry": vars(geometry) | {"dtype": str(geometry.dtype)}, "points": points})
            print(
                f"{tokens:>9,} {subject.name}: {point['ms']:.2f} ms, {point['to_packed']:.1f}x sdpa packed", flush=True
            )
    text = render(points)
    (RESULTS / "methods.md").write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    main()
