"""PyramidKV: the proofs of its card (arXiv 2406.02069)."""

from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch

from kvote import MethodError
from kvote.keep.allocate.pyramid import Pyramid
from kvote.keep.keeper import Held
from kvote.spec import parse

LAYERS, N, BUDGET, WINDOW = 4, 64, 24, 8
SPEC = f"pyramidkv(budget={BUDGET}, window={WINDOW}, beta=4"


def published(mean: int, layers: int, length: int, window: int, beta: int) -> list[int]:
    """Tokens per layer besides the window: the lines of the published code."""
    if length < mean * 2:
        return [mean] * layers
    least = mean // beta
    most = mean * 2 - least
    if most >= length - window:
        most = length - window
        least = mean * 2 - most
    steps = (most - least) // (layers - 1)
    return [most - layer * steps for layer in range(layers)]


def shares(mean: int, layers: int, length: int, window: int, beta: int) -> list[int]:
    segment: Any = None
    each = [Held(0, length, mean + window, segment, (), i, i + 1, layers=layers, seen=length) for i in range(layers)]
    return [Pyramid(beta, window).tokens(held, None, mean) for held in each]


@pytest.mark.parametrize("mean", [1, 16, 96, 992])
@pytest.mark.parametrize("layers", [2, 7, 32])
@pytest.mark.parametrize("length", [100, 193, 2000, 100_000])
@pytest.mark.parametrize("beta", [1, 3, 20])
def test_shares_are_those_of_the_published_code(mean, layers, length, beta):
    found = shares(mean, layers, length, 8, beta)
    assert found == published(mean, layers, length, 8, beta)
    # Steps are equal, rounded down.
    assert len({a - b for a, b in pairwise(found)}) == 1
    assert 0 <= sum(found) - mean * layers <= layers * (layers - 1) / 2
    if beta == 1:
        assert set(found) == {mean} or length - 8 < mean


def held(cache: Any) -> list[list[list[int]]]:
    return [[lane.tolist() for lane in cache.positions(layer)[0]] for layer in range(LAYERS)]


def fed(spec: str, n: int = N, passes: int = 0) -> Any:
    net = tiny.model(num_hidden_layers=LAYERS)
    cache = tiny.cache(net, spec)
    cache.expect(n)
    tiny.feed(net, cache, tiny.ids(1, n), passes=passes)
    return cache


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("passes", [0, 13])
def test_each_layer_keeps_what_snapkv_keeps_at_its_share(pooling, per_head, passes):
    more = f"pooling='{pooling}', per_head={per_head})"
    found = held(fed(f"{SPEC}, {more}", passes=passes))
    each = published(BUDGET - WINDOW, LAYERS, N, WINDOW, 4)
    assert len(set(each)) == LAYERS
    for layer, share in enumerate(each):
        alone = held(fed(f"snapkv(budget={share + WINDOW}, window={WINDOW}, {more}"))
        assert found[layer] == alone[layer]


def test_a_beta_of_one_is_snapkv():
    assert held(fed(f"pyramidkv(budget={BUDGET}, window={WINDOW}, beta=1)")) == held(
        fed(f"snapkv(budget={BUDGET}, window={WINDOW})")
    )


def test_short_texts_are_divided_evenly_and_those_that_fit_stay():
    assert [len(layer[0]) for layer in held(fed(f"{SPEC})", 31))] == [BUDGET] * LAYERS
    assert [len(layer[0]) for layer in held(fed(f"{SPEC})", BUDGET))] == [BUDGET] * LAYERS
    assert [len(layer[0]) for layer in held(fed(f"{SPEC})", 12))] == [12] * LAYERS


def test_a_later_turn_does_not_let_deep_layers_hold_the_mean():
    net = tiny.model(num_hidden_layers=LAYERS)
    cache = tiny.cache(net, f"{SPEC})")
    for seed in range(3):
        tiny.feed(net, cache, tiny.ids(1, 64 if seed == 0 else 20, seed=seed))
    expected = [share + WINDOW for share in published(BUDGET - WINDOW, LAYERS, 104, WINDOW, 4)]
    assert [len(layer[0]) for layer in held(cache)] == expected


def test_sequences_of_a_batch_are_divided_by_their_own_lengths():
    net = tiny.model(num_hidden_layers=LAYERS)
    tokens, mask = tiny.padded(2, N, [36, 0])
    cache = tiny.cache(net, f"{SPEC})")
    tiny.feed(net, cache, tokens, mask)
    for row, n in enumerate((N - 36, N)):
        found = [len(cache.positions(layer)[row][0]) for layer in range(LAYERS)]
        assert found == [share + WINDOW for share in published(BUDGET - WINDOW, LAYERS, n, WINDOW, 4)]


def test_a_budget_of_bytes_is_obeyed():
    net = tiny.model(num_hidden_layers=LAYERS)
    cache = tiny.cache(net, "pyramidkv(budget='700KB', window=8, beta=4)")
    tiny.feed(net, cache, tiny.ids(1, 2000))
    assert 400_000 < cache.nbytes() < 700_000
    lengths = [len(layer[0]) for layer in held(cache)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 2 * lengths[-1]


def test_the_logits_of_the_prompt_are_exact_and_generated_tokens_stay():
    expected = tiny.feed(tiny.model(num_hidden_layers=LAYERS), None, tiny.ids(1, N))
    net = tiny.model(num_hidden_layers=LAYERS)
    cache = tiny.cache(net, f"{SPEC})")
    torch.testing.assert_close(tiny.feed(net, cache, tiny.ids(1, N)), expected, atol=1e-4, rtol=1e-4)
    tiny.feed(net, cache, tiny.ids(1, 5, seed=1), passes=1)
    assert all(lane[-WINDOW - 5 :] == list(range(N - WINDOW, N + 5)) for layer in held(cache) for lane in layer)


def test_a_pyramid_that_stands_on_its_head_shows(monkeypatch):
    tokens = Pyramid.tokens

    def turned(self: Pyramid, held: Any, memory: Any, mean: int) -> int:
        return 2 * mean - tokens(self, held, memory, mean)

    monkeypatch.setattr(Pyramid, "tokens", turned)
    with pytest.raises(AssertionError):
        test_each_layer_keeps_what_snapkv_keeps_at_its_share("avg", True, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pyramidkv(budget=32)", "budget must exceed the window of 32"),
        ("pyramidkv(beta=0)", "beta must be a whole number of at least 1"),
        ("pyramidkv(beta=2.5)", "beta must be a whole number"),
        ("pyramidkv(kernel=4)", "kernel must be odd"),
        ("pyramidkv | tokenselect", "differ from head to head"),
        ("pyramidkv(per_head=False) | tidaldecode", "layers do not keep the same tokens"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)
