"""Forecast of what a method gains, from a model's config and the measured speed of a machine. Nothing is timed here."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvote.errors import InputError, UnsupportedModelError
from kvote.measure.load import Load
from kvote.measure.shape import Shape, shape
from kvote.method import Method
from kvote.needs import Keys
from kvote.spec import parse
from kvote.store.uncompressed import Uncompressed

# A context in which attention reads next to nothing, and the longest that break-even is looked for in.
_DENSE = parse("dense")
FEW, LONGEST = 64, 1 << 24
DEFAULT = "default"
_STEPS_PER_OCTAVE = 16


@dataclass(frozen=True)
class Curve:
    """Seconds at some lengths, ascending, and on straight lines between and behind them."""

    points: tuple[tuple[int, float], ...]

    def at(self, tokens: int) -> float:
        """Seconds at a length. Behind the last point as steep as before it, or as all the way if that is flatter: a
        copy that outgrows what the allocator keeps gets dearer once, not with every token."""
        lengths, (first, least) = [length for length, _ in self.points], self.points[0]
        if len(lengths) == 1 or tokens <= lengths[0]:
            return self.points[0][1]
        right = min(bisect_left(lengths, tokens), len(lengths) - 1)
        (a, start), (b, stop) = self.points[right - 1 : right + 1]
        slope = (stop - start) / (b - a)
        if tokens <= b:
            return start + slope * (tokens - a)
        return stop + max(0.0, min(slope, (stop - least) / (b - first))) * (tokens - b)


@dataclass(frozen=True)
class Machine:
    """Measurements of a machine for layers of one geometry and batches of one size.

    ``bandwidth``: bytes per second that it reads at best; ``weights``: bytes of this model's weights per second in
    torch's products; ``step``: seconds of a token outside the layers. ``caches``: seconds of one layer besides its
    weights, by the tokens held, for ``"default"`` (transformers' cache and sdpa) and for methods by their spec.
    ``copy``: those that the default cache takes of it to copy itself. ``compiled``: whether kvote's kernels ran.
    ``held``: bytes of one of kvote's layers, by method and tokens; ``load``: what else ran meanwhile.
    """

    bandwidth: float
    weights: float
    step: float
    caches: Mapping[str, Curve]
    copy: Curve
    compiled: bool = True
    batch: int = 1
    held: Mapping[str, Curve] = field(default_factory=dict)
    load: Load | None = None


@dataclass(frozen=True)
class Step:
    """A generated token with one cache: seconds, how many of them go to reading (and copying) what is cached, and the
    bytes that the cache holds."""

    cache: str
    seconds: float
    reading_seconds: float
    held_bytes: int

    @property
    def reading_share(self) -> float:
        return self.reading_seconds / self.seconds


@dataclass(frozen=True)
class Prediction:
    """``default``: transformers' cache as it comes; ``dense``: kvote's, reading everything; ``method``: the one asked
    for. ``break_even``: the shortest context from which the method is faster than the default, None where none is."""

    model: str
    context: int
    batch: int
    full_layers: int
    other_layers: int
    weight_bytes: float
    weights_seconds: float
    copy_seconds: float
    default: Step
    dense: Step
    method: Step
    break_even: int | None
    notes: tuple[str, ...]

    @property
    def speedup(self) -> float:
        return self.default.seconds / self.method.seconds


def predict(config: Any, context: int, method: Method | str, machine: Machine) -> Prediction:
    """The time of a token of the model with ``context`` tokens in the cache. ``config``: transformers', or a ``Shape``.

    Raises InputError for a context without a token, and for a method that ``machine`` was not measured with.
    """
    method = parse(method) if isinstance(method, str) else method
    model = config if isinstance(config, Shape) else shape(config, machine.batch)
    refuse(model, method)
    refuse_context(model, context)
    for name in (DEFAULT, "dense", method.spec):
        if name not in machine.caches:
            raise InputError(f"This machine was not measured with {name}.")
    weights = model.weight_bytes / machine.weights

    def step(name: str, held: int) -> Step:
        reading = model.full * (machine.caches[name].at(context) - machine.caches[name].at(FEW))
        return Step(name, _seconds(model, machine, name, context) + weights, max(0.0, reading), held)

    default = machine.caches[DEFAULT]
    return Prediction(
        model=model.name,
        context=context,
        batch=machine.batch,
        full_layers=model.full,
        other_layers=model.others,
        weight_bytes=model.weight_bytes,
        weights_seconds=weights,
        copy_seconds=model.full * machine.copy.at(context),
        default=step(DEFAULT, _held(model, machine, context, None)),
        dense=step("dense", _held(model, machine, context, parse("dense"))),
        method=step(method.spec, _held(model, machine, context, method)),
        break_even=break_even(default, machine.caches[method.spec]),
        notes=_notes(model, context, method, machine),
    )


def refuse(model: Shape, method: Method) -> None:
    """Raises UnsupportedModelError for a method that the model cannot be used with."""
    if method.read.needs.keys is Keys.UNROTATED and not model.rotary:
        raise UnsupportedModelError(f"{model.name} has no rotary positions that kvote can undo; use method 'dense'.")
    if method.read.needs.other_layers or method.calibrations:
        raise UnsupportedModelError(
            f"{method.spec} cannot be predicted: one layer is measured for all, without weights to calibrate with; "
            "measure it on the model itself."
        )


def refuse_context(model: Shape, context: int) -> None:
    """Raises InputError for a context without a token, or longer than the model or a prediction reaches."""
    if context < 1:
        raise InputError(f"A context holds at least one token; got {context}.")
    if model.learned and model.trained is not None and context > model.trained:
        raise InputError(f"{model.name} has {model.trained:,} positions and reads no longer text; got {context:,}.")
    if context > LONGEST:
        raise InputError(f"Predictions reach {LONGEST:,} tokens; got {context:,}.")


def break_even(default: Curve, method: Curve) -> int | None:
    """The shortest length from which on ``method`` stays faster, to 5%; None where it is not, however long the text."""
    grid = sorted({round(2 ** (i / _STEPS_PER_OCTAVE)) for i in range(_STEPS_PER_OCTAVE * LONGEST.bit_length())})
    lengths = [length for length in grid if length <= LONGEST]
    found = None
    for length in reversed(lengths):
        if method.at(length) >= default.at(length):
            break
        found = length
    return found


def _seconds(model: Shape, machine: Machine, name: str, context: int) -> float:
    """Seconds of a token besides its weights. Layers that are not kvote's stay as they are."""
    default = machine.caches[DEFAULT]
    others = model.others * default.at(min(context, model.window or FEW))
    return machine.step + others + model.full * machine.caches[name].at(context)


def reading_bytes(model: Shape, context: int, method: Method, machine: Machine) -> int:
    """Bytes that full-attention layers hold at most while a prompt of ``context`` tokens is read: whoever drops or
    encodes after a prompt has held all of it, at worst in every layer at once."""
    held = _held(model, machine, context, method)
    waits = (method.keep.offers.drops and method.keep.offers.waits) or not isinstance(method.store, Uncompressed)
    return max(held, _held(model, machine, context, _DENSE)) if waits else held


def _held(model: Shape, machine: Machine, context: int, method: Method | None) -> int:
    """Bytes that full-attention layers hold: keys and values, and kvote's positions and sketches. Measured where that
    was done."""
    if method is not None and method.spec in machine.held:
        return int(model.full * machine.held[method.spec].at(context))
    geometry, tokens, extra = model.geometry, context, 0.0
    budget = None if method is None else method.keep.budget
    if method is not None:
        if budget is not None and budget.unit != "bytes":
            tokens = min(context, budget.tokens(context))
        indexes = [index for index in method.read.needs.indexes if index.required or machine.compiled]
        extra = geometry.kv_heads * (4 + sum(index.token_bytes(geometry.dim, geometry.dtype) for index in indexes))
    held = int(model.full * machine.batch * tokens * (geometry.token_bytes + extra))
    return min(held, int(budget.amount)) if budget is not None and budget.unit == "bytes" else held


def beyond_training(model: Shape, context: int) -> str | None:
    """A warning for a context that is longer than the model was trained for."""
    if model.trained is None or context <= model.trained:
        return None
    return f"The model was made for {model.trained:,} tokens; beyond, some methods answer and some do not."


def _notes(model: Shape, context: int, method: Method, machine: Machine) -> tuple[str, ...]:
    notes = list(model.notes)
    if method.read.new_memory() is not None:
        notes.append("Every step is taken to select anew; those that reuse a selection are faster.")
    if model.others:
        notes.append(
            f"{model.others} of {model.full + model.others} layers do not attend to everything; kvote leaves them as "
            "they are, and they are the same for every cache."
        )
    if beyond := beyond_training(model, context):
        notes.append(beyond)
    longest = max(length for length, _ in machine.caches[DEFAULT].points)
    if context > longest:
        notes.append(f"The default cache was measured up to {longest:,} tokens; its time grows in a straight line.")
    if not machine.compiled:
        notes.append("The compiled kernels do not run here; kvote was measured in plain torch (see kvote env).")
    return tuple(notes)
