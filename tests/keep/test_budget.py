"""The one dial: tokens, a fraction or bytes."""

import pytest
import tiny

from kvote import MethodError
from kvote.keep.budget import Budget, budget


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1024, Budget(1024)),
        (1, Budget(1)),
        (0.25, Budget(0.25, "fraction")),
        (1.0, Budget(1.0, "fraction")),
        ("512MiB", Budget(512 * 2**20, "bytes")),
        (" 1.5 GB ", Budget(1.5e9, "bytes")),
        ("100B", Budget(100, "bytes")),
    ],
)
def test_a_budget_is_read_as_it_is_written(value, expected):
    assert budget(value) == expected


@pytest.mark.parametrize("value", [0, -1, 1.5, 0.0, float("nan"), True, None, "1024", "0.25", "MiB", "5 mib", "1e3KB"])
def test_a_budget_that_makes_no_sense_is_refused_in_one_sentence(value):
    with pytest.raises(MethodError, match=r"^budget must be tokens such as 1024, .*; got .*\.$"):
        budget(value)


def test_a_fraction_follows_the_tokens_seen():
    assert [budget(0.25).tokens(seen) for seen in (1, 4, 7, 8, 1000)] == [1, 1, 1, 2, 250]
    assert budget(30).tokens(10_000) == 30


@pytest.mark.parametrize("method", ["h2o(budget={})", "snapkv(budget={}, window=8)", "h2o(budget={}, per_head=False)"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("each", [150_000, 400_000])
def test_bytes_held_fall_to_the_budget_and_use_it(method, rows, each):
    net, size = tiny.model(), rows * each
    cache, dense = tiny.cache(net, method.format(f"'{size}B'")), tiny.cache(net)
    for either in (cache, dense):
        tiny.feed(net, either, tiny.ids(rows, 2000))
    assert dense.nbytes() > size
    report = cache.report().layers[0]
    assert report.dropped > 0
    # A prompt ends at the budget.
    assert report.budget * rows == report.tokens_held
    held = []
    for seed in range(70 if "h2o" in method else 1):
        held.append(cache.nbytes())
        tiny.feed(net, cache, tiny.ids(rows, 1, seed))
    assert size / 3 < max(held) <= size
    after = cache.report().layers[0]
    burst = max(1, report.budget // 64)
    fewest, most = (report.budget - burst + 1, report.budget) if "h2o" in method else [report.budget + 1] * 2
    assert fewest * rows <= after.tokens_held <= most * rows


def test_bytes_for_not_even_a_page_are_refused():
    net = tiny.model()
    with pytest.raises(MethodError, match=r"h2o.*9,000 bytes for 2 layers and 1 sequences leave no page"):
        tiny.feed(net, tiny.cache(net, "h2o(budget='9000B')"), tiny.ids(1, 10))


def test_the_report_shows_what_the_budget_allows():
    net = tiny.model()
    shown = {"dense": None, "h2o(budget=0.5)": 20, "snapkv(budget=30, window=4)": 30, "streamingllm": 1024}
    for method, tokens in shown.items():
        cache = tiny.cache(net, method)
        tiny.feed(net, cache, tiny.ids(2, 40))
        assert [layer.budget for layer in cache.report().layers] == [tokens] * 2
        assert "budget" in str(cache.report()).splitlines()[1]


def test_a_share_may_have_a_least_and_tokens_besides():
    dial = Budget(0.2, "fraction", least=4000, besides=4)
    assert [dial.tokens(seen) for seen in (1, 20_000, 20_005, 100_000)] == [4004, 4004, 4005, 20_004]
    assert Budget(1, "tokens").tokens(10) == 1
