"""The probe measures the caches it says it measures; how long they take is nobody's business here."""

from dataclasses import replace

import pytest
import torch

from kvote import InputError
from kvote.kernels import cpu
from kvote.measure import Geometry, probe, sweep
from kvote.measure.forecast import DEFAULT, FEW, predict, reading_bytes
from kvote.measure.shape import Matrix, Shape
from kvote.spec import parse

MODEL = Shape(
    name="Model",
    geometry=Geometry(4, 2, 16, torch.float32),
    full=2,
    others=0,
    window=None,
    rotary=True,
    matrices=(Matrix(64, 64, 8.0), Matrix(100, 64, 1.0)),
    resident_bytes=10**6,
    trained=None,
    notes=(),
)
METHODS = ["tokenselect(top_k=32, sinks=4, window=60)", "streamingllm(sinks=4, window=200)"]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "_BYTES", 1 << 12)
    for name, value in {
        "_LONG": 1200,
        "_FIRST": 100,
        "_ROUNDS": 1,
        "_NEW": 1,
        "_WEIGHTS": 1 << 15,
        "_KNEE": 10,
    }.items():
        monkeypatch.setattr(probe, name, value)
    # So that the default is measured as far as methods are.
    monkeypatch.setattr(probe, "_PATIENCE", 1e9)


def test_every_cache_is_measured_at_every_length():
    machine = probe.measure(MODEL, 1600, METHODS)
    specs = [parse(method).spec for method in METHODS]
    assert machine.caches.keys() == {DEFAULT, "dense", *specs}
    for curve in machine.caches.values():
        lengths = [length for length, _ in curve.points]
        assert lengths == sorted(lengths)
        assert {FEW, 400, 1600} <= set(lengths)
    # Before and behind the length at which a list stops growing.
    lengths = [length for length, _ in machine.caches[specs[0]].points]
    assert len(lengths) == 5
    assert FEW < lengths[1] < 97 <= lengths[2] < 400
    assert machine.weights > 0
    assert machine.bandwidth > 0
    assert machine.compiled == (cpu.why_not() is None)
    assert [length for length, _ in machine.copy.points] == [FEW, 400, 1600]
    made = predict(MODEL, 1600, METHODS[0], machine)
    assert made.default.seconds > 0


def test_the_length_asked_for_is_measured():
    machine = probe.measure(MODEL, 700, METHODS[:1])
    assert all(700 in [length for length, _ in curve.points] for curve in (*machine.caches.values(), machine.copy))


def test_a_text_is_at_least_so_long_that_a_selection_leaves_something_out():
    machine = probe.measure(MODEL, 10, METHODS[:1])
    assert max(length for length, _ in machine.caches[DEFAULT].points) == 1200


def test_every_step_selects_anew():
    bench = probe._Bench(MODEL.geometry, 1, sweep.Sweep(), 500)
    bench.lengthen(500)
    probed = bench.probe(parse(METHODS[0]), 500)
    assert len(probed.steps(bench.sweep)) == 1
    (layer,) = probed.cache.managed
    assert layer.activity.selections == layer.activity.calls == 2
    assert layer.activity.reused == 0
    assert layer.seen == 502


@pytest.mark.parametrize("batch", [1, 2])
def test_a_batch_is_measured_as_one(batch):
    machine = probe.measure(MODEL, 200, [], batch)
    assert machine.batch == batch
    assert machine.caches.keys() == {DEFAULT, "dense"}


def test_a_slow_default_cache_is_measured_on_shorter_texts(monkeypatch):
    monkeypatch.setattr(probe, "_PATIENCE", 0.0)
    machine = probe.measure(MODEL, 1600, METHODS[:1])
    assert max(length for length, _ in machine.caches[DEFAULT].points) == 100
    assert max(length for length, _ in machine.caches["dense"].points) == 1600


def test_what_does_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr(probe, "memory", lambda: (2**30, 2**10))
    with pytest.raises(
        InputError, match=r"Measuring 8 sequences takes more memory than is free; give a smaller --batch\."
    ):
        probe.measure(replace(MODEL), 1600, [], 8)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [
        (9, 3, 64),
        (14, 2, 64),
        (12, 2, 128),
        (28, 4, 128),
        (40, 8, 128),
        (24, 8, 128),
        (71, 1, 64),
        (25, 5, 40),
        (3, 1, 2),
    ],
)
def test_any_heads_are_measured(heads, kv_heads, dim):
    model = replace(MODEL, geometry=Geometry(heads, kv_heads, dim))
    machine = probe.measure(model, 300, METHODS)
    assert machine.caches.keys() == {DEFAULT, *(parse(method).spec for method in (*METHODS, "dense"))}
    # The C++ kernels read heads of a multiple of 16 channels, and for at most 16 query heads each.
    assert machine.compiled == (cpu.why_not() is None and dim % 16 == 0 and heads <= 16 * kv_heads)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("method", ["h2o(budget=128)", "snapkv(budget=128)", "kivi", "mikv"])
def test_a_prompt_ends_before_its_tokens_are_measured(method, batch):
    """Else nothing would have been dropped or encoded, or there would be nothing to drop by."""
    machine = probe.measure(MODEL, 1600, [method], batch)
    spec = parse(method).spec
    assert machine.held[spec].at(1600) < 0.5 * machine.held["dense"].at(1600)
    made = predict(MODEL, 1600, method, machine)
    assert made.method.held_bytes == int(MODEL.full * machine.held[spec].at(1600))
    assert reading_bytes(MODEL, 1600, parse(method), machine) == made.dense.held_bytes


def test_what_takes_too_long_is_measured_once(monkeypatch):
    monkeypatch.setattr(probe, "_ROUNDS", 50)
    monkeypatch.setattr(probe, "_ENOUGH", 0.0)
    bench = probe._Bench(MODEL.geometry, 1, sweep.Sweep(), 500)
    probed = bench.probe(None, 100)
    bench.seconds({DEFAULT: probed})
    # One step for the token of the prompt, and one more.
    assert probed.cache.get_seq_length() == 102


def test_what_else_ran_is_noted():
    load = probe.measure(MODEL, 200, []).load
    assert load is not None
    assert 0 <= load.waited <= load.wall
