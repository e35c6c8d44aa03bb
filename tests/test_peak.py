"""Memory is foreseen by what a method holds when it holds most, and the report says what that was."""

import pytest
import tiny
import torch

from kvote.peak import Shape, peak_bytes, shape_of
from kvote.spec import parse

TOKENS = 6000
SPECS = [
    "dense",
    "streamingllm(sinks=4, window=200)",
    "tokenselect(top_k=200)",
    "h2o(budget=400)",
    "snapkv(budget=400)",
    "mikv(budget=400, balancer=False)",
    "kivi",
    "kivi(bits=4)",
    "think",
    "xkv(group=2, key_rank=8, value_rank=8)",
    "minicache",
    "cake(budget=400)",
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("passes", [1500, 6000], ids=["passes", "whole"])
def test_what_is_foreseen_is_what_is_held(spec, passes):
    net = tiny.model(num_hidden_layers=4, head_dim=64)
    cache = tiny.cache(net, spec)
    cache.expect(TOKENS)
    tiny.feed(net, cache, tiny.ids(1, TOKENS), passes=passes)
    held = cache.passes.peak
    foreseen = peak_bytes(parse(spec), shape_of(net), TOKENS, tokens_per_pass=passes)
    # Room is foreseen that may not be used.
    assert 0.9 * held <= foreseen <= 1.45 * held


def test_evictors_hold_the_whole_prompt_and_packers_less_than_all_of_it():
    shape = Shape(32, 8, 128, torch.bfloat16)

    def foreseen(spec: str, passes: int) -> float:
        return peak_bytes(parse(spec), shape, 100_000, tokens_per_pass=passes)

    dense = foreseen("dense", 4096)
    assert foreseen("h2o(budget=1024)", 4096) >= dense
    assert foreseen("streamingllm", 4096) < 0.1 * dense
    assert foreseen("kivi", 100_000) < 0.3 * dense
    assert foreseen("h2o(budget=1024)", 100_000) < 0.1 * dense


@pytest.mark.parametrize("spec", ["h2o(budget=64)", "kivi(residual=32)", "dense"])
def test_a_report_says_the_peak(spec):
    net = tiny.model()
    cache = tiny.cache(net, spec)
    cache.expect(1000)
    tiny.feed(net, cache, tiny.ids(1, 1000), passes=250)
    report = cache.report()
    assert report.peak_nbytes >= report.nbytes
    whole = 2 * 2 * 1000 * (2 * 16 * 4 + 4)
    assert report.peak_nbytes > whole
    assert (report.nbytes < report.peak_nbytes) == (spec != "dense")
    assert report.to_dict()["peak_nbytes"] == report.peak_nbytes
    cache.reset()
    tiny.feed(net, cache, tiny.ids(1, 10))
    assert cache.report().peak_nbytes < whole / 10
