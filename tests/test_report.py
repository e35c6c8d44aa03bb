"""What a cache says about itself."""

import json
from itertools import chain

import pytest
import scored
import tiny

LOSSY = "tokenselect(top_k=4, sinks=2, window=4, chunk=8, tail=3, theta=2.0)"


def test_tokens_seen_and_held_are_counted_per_layer():
    net = tiny.model()
    cache = tiny.cache(net)
    tokens, mask = tiny.padded(2, 20, [5, 0])
    tiny.feed(net, cache, tokens, mask)
    for index, layer in enumerate(cache.report().layers):
        assert (layer.layer, layer.tokens_seen, layer.tokens_held, layer.calls) == (index, 20, 35, 1)
        assert (layer.tokens_read, layer.selections, layer.reused, layer.dropped) == (20, 0, 0, 0)


def test_dropped_tokens_are_counted_and_their_bytes_go():
    net = tiny.model()
    cache, dense = tiny.cache(net, "streamingllm(sinks=2, window=30)"), tiny.cache(net)
    for each in (cache, dense):
        tiny.feed(net, each, tiny.ids(1, 1000), passes=250)
    for layer in cache.report().layers:
        assert (layer.tokens_seen, layer.tokens_held, layer.tokens_read, layer.dropped) == (1000, 32, 32, 968)
    assert cache.managed[0].segment.nbytes < dense.managed[0].segment.nbytes / 4
    assert cache.nbytes() < dense.nbytes() / 2


def test_selections_are_counted():
    net = tiny.model()
    cache = tiny.cache(net, LOSSY)
    tiny.feed(net, cache, tiny.ids(1, 40))
    before = cache.report().layers[0].selections
    tiny.feed(net, cache, tiny.ids(1, 5), passes=1)
    assert cache.report().layers[0].selections == before + 5
    assert cache.report().layers[0].tokens_read == 2 + 4 + 4 + 1


def test_a_report_is_json_and_a_table():
    net = tiny.model()
    cache = tiny.cache(net, LOSSY)
    tiny.feed(net, cache, tiny.ids(1, 40))
    report = cache.report()
    read = json.loads(json.dumps(report.to_dict()))
    assert read["nbytes"] == report.nbytes == cache.nbytes()
    assert read["layers"][1]["tokens_seen"] == 40
    lines = str(report).splitlines()
    assert lines[0].startswith("tokenselect(top_k=4")
    assert f"{report.nbytes:,} bytes, {report.peak_nbytes:,} at the peak; trial of the model 0" in lines[0]
    assert report.trial_seconds > 0
    assert len(lines) == 2 + len(report.layers)


def test_a_hybrid_model_reports_its_managed_layers_and_counts_all_bytes():
    net = tiny.model("gemma3")
    cache = tiny.cache(net)
    tiny.feed(net, cache, tiny.ids(1, 20))
    report = cache.report()
    assert [layer.layer for layer in report.layers] == [1]
    native = cache.layers[0]
    own = sum(t.untyped_storage().nbytes() for t in (native.keys, native.values))
    assert report.nbytes >= report.layers[0].nbytes + own > report.layers[0].nbytes


@pytest.mark.parametrize(
    ("method", "most"),
    [
        ("h2o(budget=60)", 60),
        ("razorattention(heads='{razor}')", 4004),
        ("h2o(budget=20)", None),
        ("h2o(budget=0.5)", None),
        ("dense", None),
    ],
)
def test_a_budget_that_dropped_nothing_is_told(method, most):
    net = tiny.model()
    heads = scored.file(scored.razor(net, [[0.9, 0.1], [0.2, 0.3]]))
    cache = tiny.cache(net, method.format(razor=heads))
    tiny.feed(net, cache, tiny.ids(1, 50))
    told = [] if most is None else [f"Nothing has been dropped: up to {most:,} tokens stay, and 50 were seen."]
    report = cache.report()
    assert report.notes == report.to_dict()["notes"] == told
    assert str(report).splitlines()[4:] == told


def test_positions_name_the_tokens_held_per_lane():
    net = tiny.model()
    cache = tiny.cache(net, "streamingllm(sinks=2, window=3)")
    assert cache.positions(0) == []
    tiny.feed(net, cache, tiny.ids(2, 10))
    lanes = cache.positions(1)
    assert [len(row) for row in lanes] == [2, 2]
    assert all(lane.tolist() == [0, 1, 7, 8, 9] for row in lanes for lane in row)


@pytest.mark.parametrize("layer", [0, 2, -1])
def test_positions_of_a_layer_that_is_not_managed_are_refused(layer):
    with pytest.raises(IndexError, match=f"Layer {layer} is not managed by kvote"):
        tiny.cache(tiny.model("gemma3")).positions(layer)


@pytest.mark.parametrize("method", ["streamingllm(sinks=4, window=300)", "tokenselect(top_k=300)"])
def test_nbytes_counts_rotary_tables_too(method):
    net = tiny.model()
    cache = tiny.cache(net, method)
    tiny.feed(net, cache, tiny.ids(1, 600), passes=100)
    storages = {}
    for layer in cache.managed:
        rope = layer.rope
        # Tables of angles, and what is remembered of the last pass.
        for held in (*chain(*rope._tables.values()), rope._last[0], *rope._last[2], *chain(*rope._backwards)):
            storages[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    pools = sum(layer.segment.nbytes for layer in cache.managed)
    assert cache.nbytes() == pools + sum(storages.values()) > pools
