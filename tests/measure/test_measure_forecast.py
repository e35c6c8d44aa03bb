from dataclasses import replace
from itertools import pairwise

import pytest
import scored
import tiny
import torch

from kvote import InputError, UnsupportedModelError
from kvote.kernels import cpu
from kvote.measure.forecast import DEFAULT, FEW, LONGEST, Curve, Machine, break_even, predict
from kvote.measure.geometry import Geometry
from kvote.measure.shape import Matrix, Shape
from kvote.methods import duoattention
from kvote.spec import parse

METHOD = "tokenselect(sketch='int8')"
MODEL = Shape(
    name="Model",
    geometry=Geometry(32, 8, 64, torch.bfloat16),
    full=16,
    others=0,
    window=None,
    rotary=True,
    matrices=(Matrix(1000, 1000, 500.0),),
    resident_bytes=2 * 10**9,
    trained=None,
    notes=(),
)


def line(fixed: float, per_token: float) -> Curve:
    return Curve(tuple((n, fixed + per_token * n) for n in (FEW, 32_768, 131_072)))


def machine(**changes) -> Machine:
    caches = {DEFAULT: line(1e-3, 1e-6), "dense": line(1.2e-3, 4e-7), METHOD: line(5e-3, 1e-8)}
    made = Machine(bandwidth=3e10, weights=1e10, step=2e-3, caches=caches, copy=line(0.0, 3e-7))
    return replace(made, **changes)


def test_a_curve_is_straight_between_its_points():
    curve = Curve(((10, 1.0), (20, 2.0), (40, 6.0)))
    assert [curve.at(n) for n in (1, 10, 15, 20, 30, 40)] == [1.0, 1.0, 1.5, 2.0, 4.0, 6.0]


def test_behind_its_last_point_a_curve_takes_the_flatter_way():
    assert Curve(((0, 0.0), (10, 1.0), (20, 3.0))).at(40) == pytest.approx(3.0 + 20 * 3.0 / 20)
    assert Curve(((0, 0.0), (10, 2.0), (20, 3.0))).at(40) == pytest.approx(3.0 + 20 * 0.1)
    assert Curve(((0, 5.0), (10, 4.0))).at(40) == 4.0
    assert Curve(((10, 4.0),)).at(40) == 4.0


def test_a_token_is_weights_and_layers_and_the_rest():
    made = predict(MODEL, 131_072, METHOD, machine())
    assert made.weight_bytes == 1e9
    assert made.weights_seconds == pytest.approx(0.1)
    assert made.default.seconds == pytest.approx(0.1 + 2e-3 + 16 * (1e-3 + 131_072e-6))
    assert made.dense.seconds == pytest.approx(0.1 + 2e-3 + 16 * (1.2e-3 + 131_072 * 4e-7))
    assert made.method.seconds == pytest.approx(0.1 + 2e-3 + 16 * (5e-3 + 131_072e-8))
    assert made.default.reading_seconds == pytest.approx(16 * (131_072 - FEW) * 1e-6)
    assert made.copy_seconds == pytest.approx(16 * 131_072 * 3e-7)
    assert 0 < made.method.reading_share < made.default.reading_share < 1
    assert made.speedup == pytest.approx(made.default.seconds / made.method.seconds)


def test_a_prediction_grows_with_the_context():
    made = [predict(MODEL, n, METHOD, machine()) for n in (1, 500, 10_000, 100_000, 1_000_000)]
    for shorter, longer in pairwise(made):
        for cache in ("default", "dense", "method"):
            assert getattr(shorter, cache).seconds <= getattr(longer, cache).seconds
            assert getattr(shorter, cache).held_bytes < getattr(longer, cache).held_bytes
        assert shorter.speedup < longer.speedup


def test_break_even_is_where_the_curves_cross():
    default, method = machine().caches[DEFAULT], machine().caches[METHOD]
    found = break_even(default, method)
    exact = 4e-3 / (1e-6 - 1e-8)
    assert found is not None
    assert exact <= found <= 1.05 * exact
    assert predict(MODEL, found, METHOD, machine()).speedup > 1
    assert predict(MODEL, found // 2, METHOD, machine()).speedup < 1


def test_break_even_may_be_nowhere_or_everywhere():
    default = machine().caches[DEFAULT]
    assert break_even(default, line(2e-3, 1e-6)) is None
    assert break_even(default, line(2e-3, 2e-6)) is None
    assert break_even(default, line(0.5e-3, 1e-8)) == 1
    assert break_even(line(0.0, 1e-12), line(2 * LONGEST * 1e-12, 0.0)) is None


def test_a_method_that_wins_only_for_a_while_has_no_break_even():
    hump = Curve(((FEW, 1e-4), (1000, 1e-4), (10_000, 1.0)))
    assert break_even(line(1e-3, 1e-6), hump) is None


@pytest.mark.parametrize("window", [None, 4096])
def test_layers_of_another_kind_cost_the_same_with_every_cache(window):
    hybrid = replace(MODEL, others=10, window=window)
    plain, made = (predict(model, 100_000, METHOD, machine()) for model in (MODEL, hybrid))
    more = 10 * machine().caches[DEFAULT].at(window or FEW)
    for cache in ("default", "dense", "method"):
        assert getattr(made, cache).seconds - getattr(plain, cache).seconds == pytest.approx(more)
        assert getattr(made, cache).held_bytes == getattr(plain, cache).held_bytes
    assert made.break_even == plain.break_even
    assert any("10 of 26 layers" in note for note in made.notes)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_bytes_held(batch):
    made = predict(MODEL, 10_000, METHOD, machine(batch=batch))
    keys_and_values = batch * 16 * 10_000 * 2 * 8 * 64 * 2
    positions, sketch = batch * 16 * 10_000 * 8 * 4, batch * 16 * 10_000 * 8 * cpu.sketch_bytes(64, 8) // 32
    assert made.default.held_bytes == keys_and_values
    assert made.dense.held_bytes == keys_and_values + positions
    assert made.method.held_bytes == keys_and_values + positions + sketch
    without = predict(MODEL, 10_000, METHOD, machine(batch=batch, compiled=False))
    assert without.method.held_bytes == keys_and_values + positions
    assert any("compiled kernels do not run" in note for note in without.notes)


def test_a_method_that_drops_holds_what_it_keeps():
    spec = parse("streamingllm(sinks=4, window=96)").spec
    caches = {**machine().caches, spec: line(1e-3, 0.0)}
    made = predict(MODEL, 10_000, spec, machine(caches=caches))
    assert made.method.held_bytes == 16 * 100 * 8 * (2 * 64 * 2 + 4)


def test_what_cannot_be_predicted_is_refused():
    with pytest.raises(InputError, match="at least one token; got 0"):
        predict(MODEL, 0, METHOD, machine())
    with pytest.raises(InputError, match=r"not measured with tokenselect\(top_k=7\)"):
        predict(MODEL, 1000, "tokenselect(top_k=7)", machine())
    heads = scored.duo(tiny.model(), [[0, 1], [1, 0]])
    with pytest.raises(
        UnsupportedModelError, match=r"duoattention.* cannot be predicted: one layer is measured for all"
    ):
        predict(MODEL, 1000, duoattention(heads=heads), machine())
    with pytest.raises(UnsupportedModelError, match="no rotary positions"):
        predict(replace(MODEL, rotary=False), 1000, METHOD, machine())
    assert predict(replace(MODEL, rotary=False), 1000, "dense", machine()).speedup > 0
    with pytest.raises(UnsupportedModelError, match="tidaldecode cannot be predicted: one layer is measured for all"):
        predict(MODEL, 1000, "tidaldecode", machine())


def test_notes_say_what_was_not_measured():
    made = predict(replace(MODEL, trained=8192), 500_000, METHOD, machine())
    assert any("8,192 tokens" in note for note in made.notes)
    assert any("131,072 tokens" in note for note in made.notes)
    assert any("select anew" in note for note in made.notes)
    assert predict(replace(MODEL, trained=8192), 8192, "dense", machine()).notes == ()
