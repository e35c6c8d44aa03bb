"""Ada-KV: the proofs of its card (arXiv 2407.11550)."""

from typing import Any

import pytest
import tiny
import torch
from selecting import DIM, Fed
from torch import Tensor
from torch.nn import functional
from watching import weights

from kvote import MethodError
from kvote.keep.allocate.over_heads import CompetingHeads
from kvote.spec import parse
from kvote.store.pages import PAGE

N, BUDGET, WINDOW, KERNEL = 64, 24, 8, 7
BASE = BUDGET - WINDOW
SPEC = f"adakv(budget={BUDGET}, window={WINDOW}"


def skewed(spec: str, heads: int = 8, kv_heads: int = 4, rows: int = 1, n: int = 120) -> Fed:
    """Key heads of which each is asked more sharply than the one before."""
    fed = Fed(spec, heads, kv_heads, rows, n)
    fed.query *= torch.linspace(0.2, 2.5, heads)[None, :, None, None]
    return fed


def pooled(fed: Fed, row: int = 0) -> Tensor:
    """What the candidates of each key head are worth, [h, N - WINDOW]."""
    kv_heads = fed.key.shape[1]
    query, key = (fed.rotated(x, 0, N)[row : row + 1].double() for x in (fed.query, fed.key))
    attention = weights(query, key, DIM**-0.5)[0, :, -WINDOW:, :-WINDOW].sum(1)
    worth = functional.max_pool1d(attention[:, None], KERNEL, stride=1, padding=KERNEL // 2)[:, 0]
    return worth.reshape(kv_heads, -1, N - WINDOW).sum(1)


def published(worth: Tensor, safeguard: float) -> list[int]:
    """Tokens per head besides the window: the lines of the published code."""
    n = worth.shape[1]
    won = worth.flatten().sort(descending=True, stable=True).indices[: len(worth) * BASE] // n
    counts = torch.tensor([int((won == head).sum()) for head in range(len(worth))])
    return [int(c) for c in torch.round(counts * (1 - safeguard) + int(BASE * safeguard)).int()]


def slow(fed: Fed, safeguard: float, row: int = 0) -> list[list[int]]:
    worth = pooled(fed, row)
    ranked = worth.sort(descending=True, stable=True).indices
    chosen = [sorted(own[:cap].tolist()) for own, cap in zip(ranked, published(worth, safeguard), strict=True)]
    return [[*head, *range(N - WINDOW, N)] for head in chosen]


def kept(fed: Fed, row: int = 0) -> list[list[int]]:
    return [lane.tolist() for lane in fed.layer.segment.positions(row)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (3, 3), (6, 1)])
@pytest.mark.parametrize("safeguard", [0.0, 0.2, 0.7])
def test_kept_tokens_equal_the_published_lines(heads, kv_heads, safeguard):
    fed = skewed(f"{SPEC}, safeguard={safeguard})", heads, kv_heads, rows=2)
    fed.feed(N)
    for row in range(2):
        found = kept(fed, row)
        assert found == slow(fed, safeguard, row)
        assert abs(sum(map(len, found)) - kv_heads * BUDGET) <= kv_heads / 2
        assert kv_heads == 1 or len({len(lane) for lane in found}) > 1


def test_a_safeguard_of_one_is_snapkv():
    fed, other = (skewed(spec) for spec in (f"{SPEC}, safeguard=1)", f"snap{SPEC[3:]}, kernel=7, pooling='max')"))
    other.query, other.key, other.value = fed.query, fed.key, fed.value
    fed.feed(N)
    other.feed(N)
    assert kept(fed) == kept(other)


def test_without_a_safeguard_the_best_of_all_heads_together_are_kept():
    fed = skewed(f"{SPEC}, safeguard=0)")
    fed.feed(N)
    worth = pooled(fed)
    best = worth.flatten().sort(descending=True, stable=True).indices[: len(worth) * BASE]
    found = {(head, at) for head, lane in enumerate(kept(fed)) for at in lane[:-WINDOW]}
    assert found == {(int(i) // worth.shape[1], int(i) % worth.shape[1]) for i in best}


def masked(fed: Fed, lanes: list[list[int]], count: int) -> Tensor:
    """Dense attention of the last ``count`` tokens fed, of which every key head sees ``lanes`` and what came after."""
    query, key = fed.rotated(fed.query, 0, fed.at), fed.rotated(fed.key, 0, fed.at)
    groups, n = query.shape[1] // key.shape[1], fed.at
    sees = torch.zeros(len(lanes), count, n, dtype=torch.bool)
    for head, lane in enumerate(lanes):
        sees[head, :, lane] = True
    sees[:, :, N:] = torch.arange(N, n) <= torch.arange(n - count, n)[:, None]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, fed.value[:, :, :n]))
    out = functional.scaled_dot_product_attention(
        query[:, :, -count:], key, value, attn_mask=sees.repeat_interleave(groups, 0)[None]
    )
    return out.transpose(1, 2)


@pytest.mark.parametrize("counts", [[1, 1, 1], [5, 1], [1, 7, 1]], ids=str)
def test_what_is_read_equals_dense_attention_that_masks_what_each_head_gave_up(counts):
    fed = skewed(f"{SPEC}, safeguard=0)")
    fed.feed(N)
    lanes = kept(fed)
    assert len({len(lane) for lane in lanes}) > 2
    for count in counts:
        # A turn that is announced to go on drops nothing.
        out = fed.feed(count, prompt_left=50)
        torch.testing.assert_close(out, masked(fed, lanes, count), atol=1e-5, rtol=1e-5)


def test_a_generated_token_is_answered_in_one_call_for_all_heads():
    fed = skewed(f"{SPEC}, safeguard=0)")
    fed.feed(N)
    calls, kernels = [], fed.layer.segment.kernels

    class Counting:
        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(kernels, name)

    fed.layer.segment.kernels = Counting()
    fed.feed(1)
    assert calls.count("decode") == (1 if kernels.MAX_QUERIES_PER_KV else 0)


def test_a_share_that_leaves_no_more_than_the_window_keeps_the_window():
    fed = skewed(f"adakv(budget=0.1, window={WINDOW})")
    fed.feed(N)
    assert kept(fed) == [list(range(N - WINDOW, N))] * 4


def test_the_next_turn_divides_anew_and_no_head_has_more_than_it_held():
    fed = skewed(f"{SPEC}, safeguard=0.2)")
    fed.feed(N)
    before = kept(fed)
    fed.feed(20)
    after = kept(fed)
    assert after != before
    assert sum(map(len, after)) <= 4 * BUDGET + 2
    for old, new in zip(before, after, strict=True):
        assert set(new) <= {*old, *range(N, N + 20)}
        assert new[-WINDOW:] == list(range(N + 20 - WINDOW, N + 20))


def test_what_heads_give_up_is_freed():
    net = tiny.model(num_key_value_heads=4, num_attention_heads=4)
    cache = tiny.cache(net, "adakv(budget=500, window=8, safeguard=0)")
    tiny.feed(net, cache, tiny.ids(1, 2000))
    uneven = 0
    for layer in range(2):
        lengths = [len(lane) for lane in cache.positions(layer)[0]]
        pool = cache.managed[layer].segment.pool
        assert [lane.length for lane in pool.lanes] == lengths
        assert int((pool.owners > 0).sum()) == sum(-(-n // PAGE) for n in lengths)
        assert abs(sum(lengths) - 4 * 500) <= 2
        uneven += len(set(lengths)) > 1
        report = cache.report().layers[layer]
        assert (report.tokens_held, report.dropped) == (-(-sum(lengths) // 4), 2000 - -(-sum(lengths) // 4))
    assert uneven


def test_a_budget_of_bytes_is_obeyed():
    net = tiny.model(num_key_value_heads=4, num_attention_heads=4)
    cache = tiny.cache(net, "adakv(budget='700KB', window=8, safeguard=0)")
    tiny.feed(net, cache, tiny.ids(1, 2000))
    assert 400_000 < cache.nbytes() < 700_000


tokens = CompetingHeads.tokens


def even(self: CompetingHeads, worth: Any, mean: int) -> list[int]:
    return [mean] * len(worth)


def floor(self: CompetingHeads, worth: Any, mean: int) -> list[int]:
    """As one would expect a safeguard: a head's own share or what it wins, whichever is more."""
    return [max(count, int(mean * self.safeguard)) for count in tokens(CompetingHeads(0.0), worth, mean)]


@pytest.mark.parametrize("rule", [even, floor])
def test_another_division_shows(monkeypatch, rule):
    monkeypatch.setattr(CompetingHeads, "tokens", rule)
    with pytest.raises(AssertionError):
        test_kept_tokens_equal_the_published_lines(8, 4, 0.7)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("adakv(budget=32)", "budget must exceed the window of 32"),
        ("adakv(safeguard=1.5)", "safeguard must be a share from 0 to 1"),
        ("adakv(kernel=4)", "kernel must be odd"),
        ("adakv | tokenselect", "differ from head to head|different numbers of tokens"),
        ("adakv | quest", "the reader names one place in all of them"),
        ("adakv | kivi", "what is stored needs equally many"),
        ("adakv | snapkv", "both decide what to keep"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)
