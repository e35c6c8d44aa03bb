"""Offloading: tokens on a disk answer as if they were in memory."""

import copy
import gc
import os
import pickle

import pytest
import tiny
import torch

import kvote
from kvote import methods
from kvote.errors import MethodError, StorageError
from kvote.saving.caches import equal
from kvote.store.offloaded import OffloadedSegment

COLUMNS = 300
# What a reader picks by scores may turn on a rounding: in float64 it does not.
METHODS = (
    "dense",
    "tokenselect(top_k=30, sinks=4, window=40)",
    "tidaldecode(top_k=20, first=0)",
    "streamingllm(sinks=4, window=200)",
    "h2o(budget=250)",
    "snapkv(budget=200)",
)


@pytest.fixture(scope="module")
def net():
    # The tests share models that are alike.
    made = tiny.model(hidden_size=128, head_dim=16, num_attention_heads=8, num_key_value_heads=2)
    return copy.deepcopy(made).double()


def segments(cache) -> list[OffloadedSegment]:
    return [layer.layer.segment for layer in cache.layers]


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_memory(net, method, tmp_path):
    tokens, mask = tiny.padded(2, COLUMNS, [0, 21])
    near, far = tiny.cache(net, method), tiny.cache(net, f"{method} | offload(folder={str(tmp_path)!r}, recent=40)")
    for cache in (near, far):
        cache.expect(COLUMNS)
    expected, got = (tiny.feed(net, cache, tokens, mask, 90) for cache in (near, far))
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)
    longer = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
    expected, got = (tiny.feed(net, cache, tiny.ids(2, 1, 5), longer) for cache in (near, far))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    for layer in range(2):
        for mine, its in zip(far.positions(layer), near.positions(layer), strict=True):
            assert [lane.tolist() for lane in mine] == [lane.tolist() for lane in its]


def test_most_tokens_leave_memory_while_the_prompt_is_read(net, tmp_path):
    far, near = kvote.Cache(net, methods.offload(str(tmp_path), recent=40)), tiny.cache(net, "dense")
    for cache in (far, near):
        cache.expect(COLUMNS)
        tiny.feed(net, cache, tiny.ids(1, COLUMNS), None, 60)
    for segment in segments(far):
        assert segment.encoded(0) == 256
        assert segment.uncompressed.length(0) == COLUMNS - 256
    report = far.report()
    assert report.peak_nbytes < near.nbytes() / 2
    assert [layer.disk_nbytes for layer in report.layers] == [256 * 2 * 2 * 16 * 8] * 2
    assert "disk_read" in str(report)
    assert "disk_read" not in str(near.report())


def test_a_list_fetches_its_rows_only(net, tmp_path):
    cache = tiny.cache(net, f"tidaldecode(top_k=5, first=0) | offload(folder={str(tmp_path)!r}, recent=8)")
    tiny.feed(net, cache, tiny.ids(1, COLUMNS))
    before = [layer.disk_read for layer in cache.report().layers]
    tiny.feed(net, cache, tiny.ids(1, 1, 5))
    reads = [after.disk_read - old for after, old in zip(cache.report().layers, before, strict=True)]
    row, keys = 2 * 2 * 16 * 8, 256 * 2 * 16 * 8
    # The first layer reads everything and picks by the keys; the second takes over 5 tokens per query head.
    assert reads[0] == 3 * keys
    assert 0 < reads[1] <= 8 * 5 * row


def test_a_full_disk_is_told_and_the_cache_goes_on_after_a_reset(net, tmp_path, monkeypatch):
    cache = kvote.Cache(net, methods.offload(str(tmp_path), recent=8))
    write = os.pwrite

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageError, match="No space left on device"):
        tiny.feed(net, cache, tiny.ids(1, COLUMNS))
    monkeypatch.setattr(os, "pwrite", write)
    cache.reset()
    expected = tiny.feed(net, tiny.cache(net, "dense"), tiny.ids(1, COLUMNS))
    torch.testing.assert_close(tiny.feed(net, cache, tiny.ids(1, COLUMNS)), expected, atol=1e-4, rtol=1e-4)


def test_a_read_that_fails_answers_nothing_and_can_be_repeated(net, tmp_path, monkeypatch):
    cache = kvote.Cache(net, methods.offload(str(tmp_path), recent=8))
    tiny.feed(net, cache, tiny.ids(1, COLUMNS))
    read = os.preadv

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(StorageError):
        tiny.feed(net, cache, tiny.ids(1, 1, 5))
    monkeypatch.setattr(os, "preadv", read)
    dense = tiny.cache(net, "dense")
    tiny.feed(net, dense, tiny.ids(1, COLUMNS))
    got, expected = (tiny.feed(net, each, tiny.ids(1, 1, 5)) for each in (cache, dense))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_forks_share_the_file_and_diverge(net, tmp_path):
    cache = kvote.Cache(net, methods.offload(str(tmp_path), recent=8))
    tiny.feed(net, cache, tiny.ids(1, COLUMNS))
    spill = segments(cache)[0].disk.spill
    held = spill.nbytes
    fork = cache.fork()
    assert spill.nbytes == held
    one, other = (tiny.feed(net, each, tiny.ids(1, 100, seed)) for each, seed in ((cache, 1), (fork, 2)))
    assert not torch.equal(one, other)
    both = torch.cat([tiny.ids(1, COLUMNS), tiny.ids(1, 100, 2)], dim=1)
    expected = tiny.feed(net, tiny.cache(net, "dense"), both)[:, COLUMNS:]
    torch.testing.assert_close(other, expected, atol=1e-4, rtol=1e-4)
    del fork, other
    gc.collect()
    assert spill.nbytes < 2 * held


def test_a_saved_cache_names_no_folder_and_goes_on_elsewhere(net, tmp_path):
    (tmp_path / "here").mkdir()
    cache = kvote.Cache(net, methods.offload(str(tmp_path / "here"), recent=8))
    tiny.feed(net, cache, tiny.ids(1, COLUMNS))
    cache.save(tmp_path / "cache.kv")
    assert b"here" not in (tmp_path / "cache.kv").read_bytes()
    again = kvote.Cache.load(tmp_path / "cache.kv", net)
    assert again.method.spec == "offload(recent=8)"
    assert equal(again, cache)
    got, expected = (tiny.feed(net, each, tiny.ids(1, 3, 5)) for each in (again, cache))
    torch.testing.assert_close(got, expected)
    clone = pickle.loads(pickle.dumps(segments(cache)[0].disk))
    for mine, its in zip(clone.decode([0], range(256)), segments(cache)[0].disk.decode([0], range(256)), strict=True):
        assert torch.equal(mine, its)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(MethodError, match="is no folder that can be written into"):
        methods.offload(str(tmp_path / "none"))
    with pytest.raises(MethodError, match="recent"):
        methods.offload(str(tmp_path), recent=0)
