"""``kvote will-it-help``: what a method gains on this machine, from a model's config alone."""

import argparse
import json
import sys
from dataclasses import asdict

import transformers

from kvote.cli.show import plain_console, plain_table
from kvote.measure.config import load_config
from kvote.measure.fit import Fit, fit
from kvote.measure.forecast import Machine, Prediction, Step, beyond_training, predict, refuse, refuse_context
from kvote.measure.probe import measure
from kvote.measure.shape import shape
from kvote.spec import parse

_WIDTH = 80
# Caches this short differ by less than the measurement does.
_ALWAYS = 256


def run(args: argparse.Namespace) -> None:
    """Measures this machine for a few seconds and says what to expect: does it fit, is it faster, and by how much."""
    transformers.logging.set_verbosity_error()
    method = parse(args.method)
    model = shape(load_config(args.model), args.batch)
    refuse(model, method)
    refuse_context(model, args.context)
    if beyond := beyond_training(model, args.context):
        _say(beyond)
    machine = measure(model, args.context, [method], args.batch, _say)
    prediction = predict(model, args.context, method, machine)
    needed = fit(model, prediction, method, machine)
    if args.json:
        print(json.dumps(_as_dict(prediction, machine, needed), indent=1))
        return
    console = plain_console()
    console.width = min(console.width, _WIDTH)
    for line in (str(needed), *_speed(prediction, machine), *_facts(prediction, machine)):
        console.print(line)
    table = plain_table()
    table.add_column("cache", overflow="fold")
    for name in ("ms per\ntoken", "faster", "of it reading\nthe cache", "KV held\nMiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, step in _steps(prediction).items():
        table.add_row(name, *_figures(step, prediction.default))
    console.print(table)
    for note in prediction.notes:
        console.print(f"- {note}")


def _speed(prediction: Prediction, machine: Machine) -> list[str]:
    """The verdict, and what makes it doubtful."""
    load, found = machine.load, verdict(prediction)
    if load is None or not load.busy:
        return [found]
    return [
        f"This machine is busy ({load}): what follows was measured beside other programs, is slower than the truth and "
        "may be wrong about which cache is faster. Run it again when the machine is idle.",
        f"Measured like that: {found[0].lower()}{found[1:]}",
    ]


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


def _as_dict(prediction: Prediction, machine: Machine, needed: Fit) -> dict[str, object]:
    load = machine.load
    measured = {
        "bandwidth": machine.bandwidth,
        "weights_bandwidth": machine.weights,
        "step_seconds": machine.step,
        "layer_seconds": {name: curve.points for name, curve in machine.caches.items()},
        "copy_seconds": machine.copy.points,
        "compiled": machine.compiled,
        "load": None if load is None else {**asdict(load), "busy": load.busy},
    }
    found = {"verdict": verdict(prediction), "speedup": prediction.speedup, **asdict(prediction)}
    return {**found, "memory": {"fits": needed.fits, **asdict(needed)}, "machine": measured}


def _say(what: str) -> None:
    print(f"kvote: {what}", file=sys.stderr, flush=True)
