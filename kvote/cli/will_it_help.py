"""``kvote will-it-help``: what a method gains on this machine, from a model's config alone."""

import argparse
import json
import sys
from dataclasses import asdict

import transformers

from kvote.cli.show import plain_console, plain_table
from kvote.env import memory
from kvote.measure.forecast import Machine, Prediction, Step, predict, refuse
from kvote.measure.probe import measure
from kvote.measure.shape import Shape, load_config, shape
from kvote.method import parse

_GIB = 2**30
# Caches this short differ by less than the measurement does.
_ALWAYS = 256


def run(args: argparse.Namespace) -> None:
    """Measures this machine for a few seconds and says what to expect."""
    transformers.logging.set_verbosity_error()
    method = parse(args.method)
    model = shape(load_config(args.model), args.batch)
    refuse(model, method)
    machine = measure(model, args.context, [method], args.batch, _say)
    prediction = predict(model, args.context, method, machine)
    if args.json:
        print(json.dumps(_as_dict(prediction, machine), indent=1))
        return
    console = plain_console()
    console.print(verdict(prediction), soft_wrap=True)
    for line in _facts(prediction, machine):
        console.print(line, soft_wrap=True)
    table = plain_table()
    table.add_column("cache", overflow="fold")
    for name in ("ms per\ntoken", "faster", "of it reading\nthe cache", "KV held\nMiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, step in _steps(prediction).items():
        table.add_row(name, *_figures(step, prediction.default))
    console.print(table)
    for note in (*prediction.notes, *_memory_note(model, prediction)):
        console.print(f"- {note}", soft_wrap=True)


def verdict(prediction: Prediction) -> str:
    """One or two sentences: what the method gains at this length, and from which length on it gains anything."""
    times, ms = prediction.speedup, [1000 * step.seconds for step in (prediction.default, prediction.method)]
    spec = prediction.method.cache
    if times >= 1.05:
        gain = f"a token takes {ms[1]:,.0f} ms with {spec} instead of {ms[0]:,.0f} ms: about {_times(times)} faster"
    elif times > 0.95:
        gain = f"{spec} makes no difference ({ms[1]:,.0f} ms per token instead of {ms[0]:,.0f} ms)"
    else:
        gain = f"a token takes {ms[1]:,.0f} ms with {spec} instead of {ms[0]:,.0f} ms: about {_times(1 / times)} slower"
    return f"At {prediction.context:,} tokens {gain}; {_break_even(prediction.break_even)}."


def _break_even(tokens: int | None) -> str:
    if tokens is None:
        return "it does not help at any length"
    if tokens <= _ALWAYS:
        return "it is no slower at any length"
    return f"below about {_round(tokens):,} tokens it does not help"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 10 else f"{ratio:,.0f}x"


def _round(tokens: int) -> int:
    """Two digits, which is more than is known."""
    unit = 10 ** max(0, len(str(tokens)) - 2)
    return round(tokens / unit) * unit


def _facts(prediction: Prediction, machine: Machine) -> list[str]:
    share, copy = prediction.default.reading_share, prediction.copy_seconds / prediction.default.seconds
    layers = prediction.full_layers
    return [
        f"With transformers' default cache, {share:.0%} of a step goes into the cache of {layers} layers "
        f"({copy:.0%} into copying it for every token).",
        f"Weights of {prediction.weight_bytes / 1e9:.3g} GB take {1000 * prediction.weights_seconds:,.0f} ms at the "
        f"{machine.weights / 1e9:.1f} GB/s that torch reaches here; memory is read at "
        f"{machine.bandwidth / 1e9:.1f} GB/s.",
    ]


def _steps(prediction: Prediction) -> dict[str, Step]:
    steps = {"transformers' default": prediction.default, "kvote dense": prediction.dense}
    return (
        steps
        if prediction.method.cache == "dense"
        else {**steps, f"kvote {prediction.method.cache}": prediction.method}
    )


def _figures(step: Step, default: Step) -> list[str]:
    return [
        f"{1000 * step.seconds:,.1f}",
        _times(default.seconds / step.seconds),
        f"{step.reading_share:.0%}",
        f"{step.held_bytes / 2**20:,.1f}",
    ]


def _memory_note(model: Shape, prediction: Prediction) -> list[str]:
    total = memory()[0]
    needed = model.resident_bytes + prediction.method.held_bytes
    if not total or needed <= total:
        return []
    return [
        f"Weights and cache take {needed / _GIB:,.0f} GiB, and this machine has {total / _GIB:,.0f}: it will not run."
    ]


def _as_dict(prediction: Prediction, machine: Machine) -> dict[str, object]:
    measured = {
        "bandwidth": machine.bandwidth,
        "weights_bandwidth": machine.weights,
        "step_seconds": machine.step,
        "layer_seconds": {name: curve.points for name, curve in machine.caches.items()},
        "copy_seconds": machine.copy.points,
        "compiled": machine.compiled,
    }
    found = {"verdict": verdict(prediction), "speedup": prediction.speedup, **asdict(prediction)}
    return {**found, "machine": measured}


def _say(what: str) -> None:
    print(f"kvote: {what}", file=sys.stderr, flush=True)
