"""The time of a token of a model on this machine, measured without the model.

A model is timed whose one layer has the attention of the model in question and next to no weights: it goes through
``generate()`` as the real one would, with transformers' cache and with kvote's, so that everything on the way is in the
figure. Weights are timed apart, as torch multiplies them. Caches are cold whenever the clock starts.
"""

import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaConfig
from transformers.generation.streamers import BaseStreamer

import kvote
from kvote import kernels
from kvote.env import memory
from kvote.errors import InputError
from kvote.measure.clock import Call, alternating, timed
from kvote.measure.forecast import DEFAULT, FEW, LONGEST, Curve, Machine
from kvote.measure.geometry import Geometry
from kvote.measure.load import LoadMeter
from kvote.measure.shape import Matrix, Shape
from kvote.measure.sweep import Sweep
from kvote.method import Method
from kvote.spec import parse
from kvote.store.uncompressed import Uncompressed

_WIDTH, _VOCABULARY, _LAYERS = 64, 256, 3
_DEEPER = "default, more layers"
# Every text measured is at least so long that a selection leaves most of it out.
_LONG, _FIRST = 32_768, 4096
# Seconds that a token may take in the longest one.
_PATIENCE = 0.5
_ROUNDS, _NEW = 3, 2
# Seconds after which one round has to do: on a busy machine, more of them make no better figures.
_ENOUGH = 30.0
# A list of tokens read is measured this many tokens before the text outgrows it, and after.
_KNEE = 64
# Bytes of weights of one shape that are multiplied in turn, the most of them, and the largest piece of one.
_WEIGHTS, _COPIES, _PIECE = 1 << 26, 64, 1 << 27
# The largest text in bytes, and the share of the free memory that may be taken: by the text itself, the default's cache
# and its copy, and by one cache and its sketch per method.
_SOURCE, _MEMORY, _DEFAULTS, _SKETCHED = 1 << 30, 0.6, 3.0, 1.6


class _Clock(BaseStreamer):
    """Notes how long ``generate()`` takes from one token to the next; what it does ``between`` is not timed."""

    def __init__(self, between: Callable[[], Any]) -> None:
        self.between, self.begin = between, 0.0
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter() - self.begin)
        self.between()
        self.begin = time.perf_counter()

    def end(self) -> None:
        pass

    @property
    def steps(self) -> list[float]:
        """Seconds of every token but the first; what is handed over before that is the prompt."""
        return self.times[2:]


class _Probe:
    """A model with hardly any weights, and a cache that holds ``key`` and ``value`` [batch, kv_heads, n, dim]."""

    def __init__(self, geometry: Geometry, method: Method | None, key: Tensor, value: Tensor, layers: int = 1) -> None:
        self.model, self.batch = _model(geometry, layers), key.shape[0]
        if method is None:
            self.cache: Any = DynamicCache(config=self.model.config)
            for index in range(layers):
                self.cache.update(key, value, index)
            return
        self.cache = kvote.Cache(self.model, method)
        self.cache.expect(key.shape[2])
        # Who drops or encodes looks at the end of a prompt first.
        if method.keep.offers.drops or not isinstance(method.store, Uncompressed):
            geometry.prompt(self.cache.managed, key, value)
            return
        for layer in self.cache.managed:
            geometry.fill(layer, key, value)

    def steps(self, sweep: Sweep) -> list[float]:
        """Seconds of some tokens. Nothing is taken back: a few tokens more make no difference."""
        prompt = torch.zeros(self.batch, int(self.cache.get_seq_length()) + 1, dtype=torch.long)
        clock = _Clock(lambda: self._settle(sweep))
        self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=self.cache,
            max_new_tokens=_NEW + 1,
            do_sample=False,
            streamer=clock,
        )
        return clock.steps

    def _settle(self, sweep: Sweep) -> None:
        """Has every step select anew (the probe repeats itself, a text does not), from memory."""
        for layer in getattr(self.cache, "managed", ()):
            if layer.memory is not None:
                layer.memory.forget()
        sweep()

    @property
    def nbytes(self) -> int:
        """Bytes that one layer of kvote's holds."""
        return sum(layer.nbytes for layer in self.cache.managed) // len(self.cache.managed)

    @property
    def tokens_read(self) -> int:
        return max(layer.activity.tokens_read for layer in self.cache.managed)


def _model(geometry: Geometry, layers: int) -> Any:
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        # Llama wants it to be a multiple of the heads.
        hidden_size=-(-_WIDTH // geometry.heads) * geometry.heads,
        intermediate_size=_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
        head_dim=geometry.dim,
        max_position_embeddings=LONGEST,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=geometry.dtype, attn_implementation="sdpa").eval()
    # Random weights end a text at random.
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model


class _Bench:
    """Measures tokens of probes that share one text."""

    def __init__(self, geometry: Geometry, batch: int, sweep: Sweep, fitting: int) -> None:
        self.geometry, self.batch, self.sweep, self.fitting = geometry, batch, sweep, fitting
        self.load_meter = LoadMeter()
        self.key, self.value = geometry.tokens(_FIRST, batch)

    @property
    def late(self) -> bool:
        return self.load_meter.seconds > _ENOUGH

    def lengthen(self, tokens: int) -> None:
        self.key, self.value = self.geometry.tokens(tokens, self.batch)

    def probe(self, method: Method | None, tokens: int, layers: int = 1) -> _Probe:
        return _Probe(self.geometry, method, self.key[:, :, :tokens], self.value[:, :, :tokens], layers)

    def seconds(self, probes: dict[str, _Probe]) -> dict[str, float]:
        """Seconds of a token, the median of alternating rounds."""
        times: dict[str, list[float]] = {name: [] for name in probes}
        for number in range(_ROUNDS):
            if number and self.late:
                break
            for name, probe in probes.items():
                times[name] += probe.steps(self.sweep)
        return {name: median(spent) for name, spent in times.items()}

    def copying(self, tokens: int) -> float:
        """Seconds in which a default cache of so many tokens takes in another one."""
        key, value = (x[:, :, :tokens].contiguous() for x in (self.key, self.value))

        def run() -> None:
            for x in (key, value):
                torch.cat([x, x[:, :, :1]], dim=-2)

        rounds = 1 if self.late else _ROUNDS
        return alternating({"": Call(run)}, rounds, most=_NEW, before=self.sweep)[""].seconds


def measure(
    shape: Shape,
    context: int,
    methods: Iterable[Method | str],
    batch: int = 1,
    say: Callable[[str], None] = lambda what: None,
) -> Machine:
    """Measures this machine for models of one ``shape``, up to ``context`` tokens or as far as seconds allow.

    Raises InputError where not even short texts fit into memory.
    """
    asked = [parse(method) if isinstance(method, str) else method for method in (*methods, "dense")]
    chosen = {method.spec: method for method in asked}
    sweep = Sweep()
    bench = _Bench(shape.geometry, batch, sweep, _fitting(shape.geometry, batch, len(chosen)))
    with torch.no_grad():
        say("timing the weights")
        weights = _weights_per_second(shape, bench)
        lengths = _lengths(context, bench)
        bench.lengthen(max(lengths))
        points, held, layer = _points(bench, chosen, lengths, context, say)
        copies = {length: bench.copying(length) for length in _spread(lengths[0], context)}
        load = bench.load_meter.load()
    step = max(0.0, points[DEFAULT][FEW] - layer)
    return Machine(
        bandwidth=sweep.bandwidth,
        weights=weights,
        step=step,
        caches={name: _curve({n: max(0.0, t - step) for n, t in taken.items()}) for name, taken in points.items()},
        copy=_curve(copies),
        compiled=shape.geometry.heads <= kernels.chosen(bench.key).MAX_QUERIES_PER_KV * shape.geometry.kv_heads,
        batch=batch,
        held={name: _curve(taken) for name, taken in held.items()},
        load=load,
    )


def _curve(points: dict[int, float]) -> Curve:
    return Curve(tuple(sorted(points.items())))


def _fitting(geometry: Geometry, batch: int, methods: int) -> int:
    """The longest text that may be measured, in tokens. Raises InputError where memory holds not even short ones."""
    free = memory()[1] or _SOURCE * (_DEFAULTS + _SKETCHED * methods)
    fitting = min(_SOURCE, int(_MEMORY * free / (_DEFAULTS + _SKETCHED * methods))) // (batch * geometry.token_bytes)
    if fitting < _FIRST:
        raise InputError(f"Measuring {batch:,} sequences takes more memory than is free; give a smaller --batch.")
    return fitting


def _lengths(context: int, bench: _Bench) -> tuple[int, int]:
    """How long a text may be for the default cache, which must not take too long, and for methods."""
    seconds = bench.seconds({DEFAULT: bench.probe(None, _FIRST)})[DEFAULT]
    quick = int(_FIRST * max(1.0, _PATIENCE / seconds))
    longest = min(max(context, _LONG), bench.fitting)
    return min(longest, quick), longest


def _spread(longest: int, context: int) -> set[int]:
    """Lengths to measure: the one asked for is among them, unless it is longer than the longest."""
    return {longest, longest // 4, FEW, max(FEW, min(context, longest))}


def _points(
    bench: _Bench, methods: dict[str, Method], lengths: tuple[int, int], context: int, say: Callable[[str], None]
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]], float]:
    """Seconds of a token by cache and length, bytes of a layer likewise, and the seconds of one more layer that reads
    next to nothing."""
    caches: dict[str, Method | None] = {DEFAULT: None, **methods}
    plan = {name: _spread(lengths[0] if name == DEFAULT else lengths[1], context) for name in caches}
    points: dict[str, dict[int, float]] = {name: {} for name in caches}
    held: dict[str, dict[int, float]] = {name: {} for name in methods}
    knees: dict[str, int] = {}
    for length in sorted({length for spread in plan.values() for length in spread}, reverse=True):
        say(f"timing {length:,} tokens")
        probes = {name: bench.probe(method, length) for name, method in caches.items() if length in plan[name]}
        if length == FEW:
            probes[_DEEPER] = bench.probe(None, FEW, _LAYERS)
        for name, seconds in bench.seconds(probes).items():
            points.setdefault(name, {})[length] = seconds
        for name in methods.keys() & probes.keys():
            held[name][length] = probes[name].nbytes
        if length == lengths[1]:
            knees = {name: probes[name].tokens_read for name in methods}
    for name, read in knees.items():
        for length in (read - _KNEE, read + _KNEE):
            if FEW < length < lengths[1] // 4:
                points[name][length] = bench.seconds({name: bench.probe(methods[name], length)})[name]
    deeper = points.pop(_DEEPER)[FEW]
    return points, held, max(0.0, deeper - points[DEFAULT][FEW]) / (_LAYERS - 1)


def _weights_per_second(shape: Shape, bench: _Bench) -> float:
    """Bytes per second of torch's products with the model's weights, each shape as often as a token meets it."""
    return shape.weight_bytes / sum(matrix.count * _product_seconds(matrix, bench) for matrix in shape.matrices)


def _product_seconds(matrix: Matrix, bench: _Bench) -> float:
    """Seconds of the product of one token per sequence with a weight that lies in memory."""
    dtype = bench.geometry.dtype
    rows = min(matrix.rows, max(1, _PIECE // (matrix.columns * dtype.itemsize)))
    count = min(_COPIES, max(1, _WEIGHTS // (rows * matrix.columns * dtype.itemsize)))
    weights = [torch.full((rows, matrix.columns), 0.01, dtype=dtype) for _ in range(count)]
    x = torch.randn(bench.batch, 1, matrix.columns, dtype=dtype)

    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    run()
    spent = timed(Call(run), seconds=1.0, most=1 if bench.late else _ROUNDS, before=bench.sweep)
    return spent / count * matrix.rows / rows
