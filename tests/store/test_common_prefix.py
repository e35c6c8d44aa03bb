"""Sequences that share a prefix read it once, and read the same."""

import pytest
import tiny
import torch

from kvote.kernels import reference
from kvote.store import common_prefix
from kvote.store.common_prefix import levels


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Prefixes of a page are worth reading once."""
    monkeypatch.setattr(common_prefix, "LEAST", 64)


@pytest.fixture
def read(monkeypatch):
    """What was read once, by rows and tokens."""
    seen = []

    def noted(pool, lanes):
        found = levels(pool, lanes)
        seen.append(found)
        return found

    monkeypatch.setattr(common_prefix, "levels", noted)
    return seen


def whole(net, history):
    return tiny.feed(net, None, history)[:, -1]


@pytest.mark.parametrize("heads", [2, 4, 14])
def test_rows_of_one_prompt_read_it_once(read, heads):
    net = tiny.model(hidden_size=16 * heads, head_dim=16, num_attention_heads=heads, num_key_value_heads=2)
    prompt = tiny.ids(1, 150)
    cache = tiny.cache(net)
    tiny.feed(net, cache, prompt)
    cache.batch_repeat_interleave(5)
    history = prompt.repeat(5, 1)
    for seed in range(3):
        extra = tiny.ids(5, 1, seed)
        history = torch.cat([history, extra], dim=1)
        logits = tiny.feed(net, cache, extra)
        torch.testing.assert_close(logits[:, -1], whole(net, history), atol=1e-4, rtol=1e-4)
    assert read[-1] == [([0, 1, 2, 3, 4], 0, 128)]


def test_a_tree_of_prefixes_is_read_level_by_level(read):
    net = tiny.model()
    cache, history = tiny.cache(net), tiny.ids(1, 150)
    tiny.feed(net, cache, history)
    for rows in (2, 3):
        cache.batch_repeat_interleave(rows)
        extra = tiny.ids(len(history) * rows, 100, seed=rows)
        history = torch.cat([history.repeat_interleave(rows, 0), extra], dim=1)
        tiny.feed(net, cache, extra)
    cache.reorder_cache(torch.tensor([0, 5, 2, 3, 1, 4]))
    extra = tiny.ids(6, 1, seed=7)
    history = torch.cat([history[[0, 5, 2, 3, 1, 4]], extra], dim=1)
    logits = tiny.feed(net, cache, extra)
    torch.testing.assert_close(logits[:, -1], whole(net, history), atol=1e-4, rtol=1e-4)
    assert read[-1] == [([0, 1, 2, 3, 4, 5], 0, 128), ([0, 2, 4], 128, 192), ([1, 3, 5], 128, 192)]


def test_rows_of_unlike_lengths_share_a_prefix_too(read):
    net = tiny.model()
    prompt = tiny.ids(1, 150)
    cache = tiny.cache(net)
    tiny.feed(net, cache, prompt)
    cache.batch_repeat_interleave(3)
    extra, mask = tiny.padded(3, 9, [4, 0, 8], seed=3)
    mask = torch.cat([torch.ones(3, 150, dtype=torch.long), mask], dim=1)
    tiny.feed(net, cache, extra, mask)
    last = tiny.ids(3, 1, seed=4)
    logits = tiny.feed(net, cache, last, torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1))
    for row, pad in enumerate([4, 0, 8]):
        history = torch.cat([prompt, extra[row : row + 1, pad:], last[row : row + 1]], dim=1)
        torch.testing.assert_close(logits[row : row + 1, -1], whole(net, history), atol=1e-4, rtol=1e-4)
    assert read[-1] == [([0, 1, 2], 0, 128)]


def test_a_prefix_that_was_written_to_is_no_longer_shared(read):
    net = tiny.model()
    cache = tiny.cache(net)
    tiny.feed(net, cache, tiny.ids(1, 64))
    cache.batch_repeat_interleave(2)
    cache.crop(-1)
    tiny.feed(net, cache, tiny.ids(2, 66, seed=2))
    history = torch.cat([tiny.ids(1, 63).repeat(2, 1), tiny.ids(2, 66, seed=2), tiny.ids(2, 1, seed=3)], dim=1)
    logits = tiny.feed(net, cache, tiny.ids(2, 1, seed=3))
    torch.testing.assert_close(logits[:, -1], whole(net, history), atol=1e-4, rtol=1e-4)
    assert not any(read)


def test_merging_answers_does_not_depend_on_their_order():
    parts = [(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1)) for _ in range(4)]
    at_once = reference.merge(parts)
    folded = parts[3]
    for part in (parts[1], parts[0], parts[2]):
        folded = reference.merge([part, folded])
    for mine, other in zip(folded, at_once, strict=True):
        torch.testing.assert_close(mine, other)
