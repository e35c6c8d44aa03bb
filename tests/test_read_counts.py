"""What generated tokens have read."""

import pytest
import torch

import kvote
from kvote.errors import InputError
from tests import tiny


def shares(method, tokens=60, steps=5):
    model = tiny.model("llama")
    cache = kvote.Cache(model, method)
    tiny.feed(model, cache, tiny.ids(1, tokens))
    cache.watch_reads()
    for step in range(steps):
        tiny.feed(model, cache, torch.tensor([[9 + step]]))
    return cache, cache.reads()


def test_dense_reads_everything_in_every_step():
    _, read = shares("dense")
    assert read.shape == (65,)
    assert read[:61].tolist() == pytest.approx([1.0] * 61)
    assert read[-1] == pytest.approx(1 / 5)


def test_tokenselect_reads_sinks_winners_and_a_window():
    cache, read = shares("tokenselect(top_k=8, sinks=2, window=4, theta=1)", steps=1)
    assert read[:2].tolist() == pytest.approx([1.0, 1.0])
    assert float(read.sum()) == pytest.approx(cache.report().layers[0].tokens_read, abs=0.01)


def test_dropped_tokens_are_not_read():
    _, read = shares("streamingllm(sinks=2, window=8, burst=1)")
    assert float(read[2:45].sum()) == 0
    assert read[0] == pytest.approx(1.0)


def test_nobody_watched():
    with pytest.raises(InputError, match="watch_reads"):
        kvote.Cache(tiny.model("llama")).reads()
