"""Methods that compose: every pair that is said to work runs, every other is refused when it is built."""

from pathlib import Path

import pytest
import tiny
import torch

from kvote import Cache, MethodError, read_again
from kvote.calibration.example import example, examples
from kvote.calibration.fingerprint import Fingerprint
from kvote.cli.page import page
from kvote.method import METHODS
from kvote.pairs import Pair, pairs

DOCS = Path(__file__).parents[1] / "docs" / "methods.md"
PAIRS = pairs()


def _named(pair: Pair) -> str:
    return f"{pair.left}-{pair.right}"


def test_every_pair_is_there_once():
    assert len({frozenset((pair.left, pair.right)) for pair in PAIRS}) == len(METHODS) * (len(METHODS) - 1) / 2


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.reason is None], ids=_named)
def test_a_pair_that_composes_runs(pair, monkeypatch):
    net = tiny.model(num_hidden_layers=4)
    fitting = [example(held.kind, Fingerprint.of(net)) for held in examples()]
    monkeypatch.setattr("kvote.pairs.examples", lambda: fitting)
    left, right = (_first(name, pair.given) for name in (pair.left, pair.right))
    cache = Cache(net, left | right)
    assert bool(tiny.feed(net, cache, tiny.ids(2, 300)).isfinite().all())
    read_again(net, cache, tiny.ids(2, 300))
    assert bool(tiny.feed(net, cache, tiny.ids(2, 3), passes=1).isfinite().all())
    assert cache.get_seq_length() == 303
    assert cache.nbytes() > 0


def _first(name: str, given: tuple[str, ...]):
    """The method with what it can take of ``given``."""
    from kvote.pairs import _ways

    if name == "sentencekv":
        # It must be told which tokens end a sentence.
        return METHODS[name].build(ends=(7, 9))
    if name == "tim":
        # Or which open and close lists, where nothing is marked.
        return METHODS[name].build(opens=(7,), closes=(9,))
    ways = dict(_ways(METHODS[name]))
    return ways[max((way for way in ways if set(way) <= set(given)), key=len)]


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair.reason is not None], ids=_named)
def test_a_pair_that_does_not_is_refused_naming_both(pair):
    with pytest.raises(MethodError) as caught:
        _ = _first(pair.left, ()) | _first(pair.right, ())
    assert pair.left in str(caught.value)
    assert pair.right in str(caught.value)
    assert pair.reason.removeprefix("both") in str(caught.value)


def test_parameters_are_asked_for_only_where_they_are_needed():
    found = {(pair.left, pair.right): pair for pair in PAIRS}
    assert found["snapkv", "tokenselect"].given == ("per_head=False",)
    assert found["dense", "snapkv"].given == ()
    assert found["h2o", "snapkv"].reason == "both decide what to keep"


def test_the_page_in_the_docs_is_the_one_that_is_made():
    assert DOCS.read_text() == page(), "run: kvote methods --table > docs/methods.md"


def test_an_example_fits_the_model_it_is_for():
    model = Fingerprint.of(tiny.model())
    for held in examples():
        made = example(held.kind, model)
        made.check(tiny.model())
        assert len(made.data["layers"]) == 2
    with pytest.raises(KeyError):
        example("nothing", model)
    assert torch.is_grad_enabled()
