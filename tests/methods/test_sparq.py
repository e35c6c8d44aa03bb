"""SparQ: the proofs of its card (arXiv 2312.04985)."""

from typing import Any

import pytest
import tiny
import torch
from selecting import DIM, Fed
from torch import Tensor

from kvote import MethodError
from kvote.methods import sparq
from kvote.spec import parse

N = 90


def published(fed: Fed, rank: int, k: int, local: int, mean: bool = True, temper: bool = True) -> Tensor:
    """The answer [b, 1, heads, dv] to the last token fed, as the paper writes it, sequence by sequence and key head by
    key head. Without ``mean`` or ``temper``, what its ablations leave out."""
    n, groups = fed.at, fed.query.shape[1] // fed.key.shape[1]
    queries, keys = fed.rotated(fed.query, n - 1, n)[:, :, 0], fed.rotated(fed.key, 0, n)
    out = torch.zeros(len(queries), 1, queries.shape[1], DIM)
    for row in range(len(queries)):
        for head in range(keys.shape[1]):
            own = slice(head * groups, (head + 1) * groups)
            q, key, value = queries[row, own], keys[row, head], fed.value[row, head, :n]
            i = q.abs().sum(0).topk(rank).indices
            share = q[:, i].abs().sum(1) / q.abs().sum(1) if temper else torch.ones(groups)
            logits = q[:, i] @ key[:, i].T / (DIM * share[:, None]).sqrt()
            order = logits.sum(0)
            order[n - 1 - local :] = torch.inf
            j = order.topk(k + 1).indices
            alpha = logits.softmax(1)[:, j].sum(1, keepdim=True) if mean else torch.ones(groups, 1)
            exact = (q @ key[j].T / DIM**0.5).softmax(1) @ value[j]
            out[row, 0, own] = alpha * exact + (1 - alpha) * value.mean(0)
    return out


def fed(method: str, heads: int = 4, n: int = N, rows: int = 2) -> tuple[Fed, Tensor]:
    """A layer that was fed ``n`` - 1 tokens of a prompt and one generated token, and the answer to that."""
    torch.manual_seed(0)
    made = Fed(method, heads=heads, rows=rows, n=n)
    made.feed(n - 1)
    return made, made.feed(1)


@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize(("rank", "k", "local"), [(4, 12, 3), (8, 20, 0), (16, 9, 9), (1, 5, 1)])
def test_answers_are_the_papers(heads, rank, k, local):
    made, got = fed(f"sparq(rank={rank}, top_k={k}, local={local})", heads)
    torch.testing.assert_close(got, published(made, rank, k, local), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("without", ["mean", "temper"])
def test_its_ablations_answer_something_else(without):
    made, got = fed("sparq(rank=4, top_k=12, local=3)")
    assert not torch.allclose(got, published(made, 4, 12, 3, **{without: False}), atol=1e-3)


@pytest.mark.parametrize("k", [N - 1, 500])
def test_a_budget_that_covers_everything_is_dense_attention(k):
    made, got = fed(f"sparq(rank={DIM}, top_k={k})")
    assert made.layer.activity.selections == 0
    assert torch.equal(got, fed("dense")[1])


def test_without_a_budget_the_token_reads_itself_and_the_mean():
    made, got = fed("sparq(rank=4, top_k=0, local=0)")
    torch.testing.assert_close(got, published(made, 4, 0, 0), atol=1e-5, rtol=1e-5)
    assert made.layer.activity.tokens_read == 1
    # All answers lie between the token's own value and the mean, and more tokens give the mean a smaller share.
    own, mean = made.value[:, :, N - 1], made.value[:, :, :N].mean(2)
    away = (got[:, 0].unflatten(1, (2, 2)) - mean[:, :, None]) / (own - mean)[:, :, None]
    alpha = away.mean(-1, keepdim=True)
    torch.testing.assert_close(away, alpha.expand_as(away), atol=1e-3, rtol=1e-3)
    assert bool(((alpha > 0) & (alpha <= 1)).all())


@pytest.mark.parametrize(("rank", "k"), [(1, 0), (4, 7), (16, 40)])
def test_values_that_are_all_equal_are_the_answer(rank, k):
    torch.manual_seed(0)
    made = Fed(f"sparq(rank={rank}, top_k={k}, local=0)", n=N)
    made.value[:] = torch.randn(DIM)
    made.feed(N - 1)
    torch.testing.assert_close(made.feed(1), made.value[:, :1, :1].expand(1, 1, 4, DIM), atol=1e-5, rtol=1e-5)


def test_tokens_far_below_the_rest_leave_the_mean_everything_and_nothing_breaks():
    """Shares of the softmax that no float32 can hold, and a query without the channels chosen."""
    torch.manual_seed(0)
    made = Fed("sparq(rank=2, top_k=3, local=3)", n=N)
    made.query[:, :, -1] *= 1e4
    made.query[:, 1, -1] = 0
    made.feed(N - 1)
    got = made.feed(1)
    assert bool(got.isfinite().all())
    some = [0, 2, 3]
    torch.testing.assert_close(got[:, :, some], published(made, 2, 3, 3)[:, :, some], atol=1e-4, rtol=1e-4)


def test_the_mean_follows_rollbacks_and_copies():
    net = tiny.model()
    method, tokens, more = "sparq(rank=4, top_k=8, local=2)", tiny.ids(2, 150), tiny.ids(2, 70, seed=7)
    cache, fresh = tiny.cache(net, method), tiny.cache(net, method)
    tiny.feed(net, cache, tokens)
    cache.crop(-61)
    cache.reorder_cache(torch.tensor([1, 1]))
    tiny.feed(net, fresh, tokens[[1, 1], :89])
    got, expected = (tiny.feed(net, each, more, passes=1) for each in (cache, fresh))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    for layer in cache.managed:
        segment = layer.segment
        values = segment.decode([0, 1], 0, 159)[1]
        torch.testing.assert_close(segment.indexes["value sums"].mean([0, 1], 159), values.mean(2))


def test_the_mean_is_that_of_the_tokens_another_method_keeps():
    net, tokens = tiny.model(), tiny.ids(2, 100)
    cache = tiny.cache(net, "h2o(budget=40) | sparq(rank=4, top_k=8, local=2)")
    tiny.feed(net, cache, tokens[:, :90])
    tiny.feed(net, cache, tokens[:, 90:], passes=1)
    for layer, told in zip(cache.managed, cache.report().layers, strict=True):
        n = layer.segment.length(0)
        assert told.dropped > 0
        assert told.tokens_read == 9
        values = layer.segment.decode([0, 1], 0, n)[1]
        torch.testing.assert_close(layer.segment.indexes["value sums"].mean([0, 1], n), values.mean(2))


def test_sums_are_counted():
    net, tokens = tiny.model(), tiny.ids(1, 90)
    caches: list[Any] = [tiny.cache(net, method) for method in ("dense", "sparq")]
    for cache in caches:
        tiny.feed(net, cache, tokens)
    for plain, layer in zip(caches[0].managed, caches[1].managed, strict=True):
        assert layer.nbytes - plain.nbytes == len(layer.segment.pool.owners) * DIM * 4


def test_prompts_and_turns_are_read_whole():
    net, tokens = tiny.model(), tiny.ids(1, 75)
    cache = tiny.cache(net, "sparq(top_k=8, local=2)")
    tiny.feed(net, cache, tokens[:, :50])
    tiny.feed(net, cache, tokens[:, 50:70])
    assert all(layer.selections == 0 for layer in cache.report().layers)
    tiny.feed(net, cache, tokens[:, 70:], passes=1)
    assert [layer.selections for layer in cache.report().layers] == [5, 5]


def test_stores_that_encode_are_refused():
    with pytest.raises(MethodError, match="the reader scores value sums"):
        parse("kivi | sparq")


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1; got 0"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0; got -1"),
        ({"local": -1}, "local must be a whole number of at least 0; got -1"),
        ({"top_k": 4, "local": 5}, r"local must be at most top_k \(4\), of which it is a part; got 5"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters, sentence):
    with pytest.raises(MethodError, match=sentence):
        sparq(**parameters)
