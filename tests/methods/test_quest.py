"""Quest: the proofs of its card (arXiv 2406.10774)."""

from functools import partial
from typing import Any

import masking
import pytest
import tiny
import torch
from masking import decoded, model, top
from torch import Tensor

from kvote import MethodError
from kvote.methods import quest
from kvote.spec import parse

PROMPT, STEPS = 90, 9
run = partial(masking.run, prompt=PROMPT, steps=STEPS)


def published(pages: int, page: int, dense_layers: int) -> Any:
    """The published rule, written as in its evaluation: keys take the sign of the query, and of each channel the
    largest in a page counts. Of the newest page, the rule of the published kernels."""

    def mask(layer: int, logits: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
        if layer < dense_layers:
            return None
        n = key.shape[2]
        last = (n - 1) // page
        signed = (key * query.sign())[:, :, : last * page].unflatten(2, (last, page)).amax(3)
        best = top((signed * query.abs()).sum(-1)[:, :, None], pages - 1)
        seen = best.repeat_interleave(page, dim=-1)
        return torch.cat([seen, torch.ones(*seen.shape[:3], n - last * page, dtype=torch.bool)], dim=-1)

    return mask


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("page", "budget", "pages"), [(16, 64, 4), (8, 40, 5), (4, 5, 3)])
@pytest.mark.parametrize("dense_layers", [0, 2])
def test_logits_are_those_of_the_published_mask(groups, page, budget, pages, dense_layers):
    net = model(groups)
    expected = decoded(net, tiny.ids(2, PROMPT + STEPS), PROMPT, published(pages, page, dense_layers))
    _, got = run(net, f"quest(token_budget={budget}, page={page}, dense_layers={dense_layers})")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(run(net, "dense")[1], expected, atol=1e-2, rtol=1e-2)


def test_pages_of_one_token_are_the_tokens_with_the_largest_logits():
    def mask(layer: int, logits: Tensor, query: Tensor, key: Tensor) -> Tensor:
        best = top(logits[..., :-1], 8)
        return torch.cat([best, torch.ones_like(best[..., :1])], dim=-1)

    net = model()
    expected = decoded(net, tiny.ids(2, PROMPT + STEPS), PROMPT, mask)
    _, got = run(net, "quest(token_budget=9, page=1, dense_layers=0)")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("budget", [PROMPT + STEPS, 2048])
def test_a_budget_that_covers_everything_is_dense_attention_bit_by_bit(budget):
    net = model()
    method = f"quest(token_budget={budget}, dense_layers=0)"
    cache, got = run(net, method)
    assert torch.equal(got, run(net, "dense")[1])
    assert all(layer.selections == 0 for layer in cache.report().layers)


def test_the_report_says_where_it_acted():
    layers = run(model(), "quest(token_budget=48)")[0].report().layers
    assert [layer.selections for layer in layers] == [0, 0, 2 * STEPS, 2 * STEPS]
    # Two whole pages, and the three tokens of the newest: 99 = 6 * 16 + 3.
    assert [layer.tokens_read for layer in layers] == [99, 99, 35, 35]
    assert all(layer.tokens_held == 2 * 99 for layer in layers)


@pytest.mark.parametrize("page", [4, 16])
def test_a_step_reads_two_numbers_per_channel_and_page_and_the_budget(page):
    """Per head, (pages * 2 + budget * 2) * d numbers where the newest page is full."""
    net, d, n, budget = model(), 16, 96, 48
    cache = tiny.cache(net, f"quest(token_budget={budget}, page={page}, dense_layers=0)")
    tokens = tiny.ids(1, n)
    tiny.feed(net, cache, tokens[:, : n - 1])
    tiny.feed(net, cache, tokens[:, n - 1 :])
    for layer, told in zip(cache.managed, cache.report().layers, strict=True):
        pool = layer.segment.pool
        bounds, keys = pool.parts["page bounds"], pool.keys
        assert bounds.nbytes * page == 2 * keys.nbytes
        pages = n // page
        each_page = bounds[0, 0].numel() * bounds.element_size()
        read = pages * each_page + told.tokens_read * 2 * d * keys.element_size()
        assert read == (pages * 2 + budget * 2) * d * 4


def test_bounds_are_counted_and_dense_layers_have_none():
    net = model()
    dense, mine = run(net, "dense")[0], run(net, "quest(token_budget=48)")[0]
    for plain, layer in zip(dense.managed, mine.managed, strict=True):
        pages = len(layer.segment.pool.owners)
        more = 0 if layer.index < 2 else pages * (64 // 16) * 2 * 16 * 4
        assert layer.nbytes - plain.nbytes == more


def test_prompts_turns_and_announced_tokens_are_read_whole():
    net = model()
    cache, tokens = tiny.cache(net, "quest(token_budget=20, page=4)"), tiny.ids(1, 75)
    cache.expect(50)
    passes = tiny.feed(net, cache, tokens[:, :50], passes=1)
    torch.testing.assert_close(passes, tiny.feed(net, tiny.cache(net), tokens[:, :50]), atol=1e-4, rtol=1e-4)
    tiny.feed(net, cache, tokens[:, 50:70])
    assert all(layer.selections == 0 for layer in cache.report().layers)
    tiny.feed(net, cache, tokens[:, 70:], passes=1)
    assert [layer.selections for layer in cache.report().layers] == [0, 0, 5, 5]


@pytest.mark.parametrize("keep", ["snapkv(budget=60, window=6)", "h2o(budget=60)"])
def test_it_reads_a_few_of_what_another_method_keeps(keep):
    layer = run(model(), f"{keep} | quest(token_budget=12, page=4)")[0].report().layers[3]
    assert layer.dropped > 0
    assert layer.tokens_read <= 12
    assert layer.selections == 2 * STEPS


def test_stores_that_encode_keys_are_refused():
    for store in ("kivi", "think"):
        with pytest.raises(
            MethodError, match="the reader scores page bounds, and they are kept beside keys as the model"
        ):
            parse(f"{store} | quest")


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"token_budget": 0}, "token_budget must be a whole number of at least 1; got 0"),
        ({"page": 0}, "page must be a whole number of at least 1; got 0"),
        ({"page": 12}, "page must divide 64 tokens, so be 1, 2, 4, 8, 16, 32 or 64; got 12"),
        ({"page": 128}, "page must divide 64 tokens, so be 1, 2, 4, 8, 16, 32 or 64; got 128"),
        ({"dense_layers": -1}, "dense_layers must be a whole number of at least 0; got -1"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters, sentence):
    with pytest.raises(MethodError, match=sentence):
        quest(**parameters)
