"""SnapKV: the proofs of its card (arXiv 2404.14469)."""

from typing import Any

import pytest
import tiny
import torch
from selecting import DIM, Fed
from torch import Tensor
from torch.nn import functional
from watching import weights

from kvote import MethodError
from kvote.keep.score.last_queries import LastQueries
from kvote.spec import parse

N, BUDGET, WINDOW = 64, 24, 8
SPEC = f"snapkv(budget={BUDGET}, window={WINDOW}"


def slow(
    fed: Fed, n: int, row: int = 0, kernel: int = 5, pooling: str = "avg", shared: bool = False
) -> list[list[int]]:
    """The published code's few lines, head by head, with the pooled votes of a group's heads added up."""
    kv_heads, groups = fed.key.shape[1], fed.query.shape[1] // fed.key.shape[1]
    query, key = (fed.rotated(x, 0, n)[row : row + 1].double() for x in (fed.query, fed.key))
    attention = weights(query, key, DIM**-0.5)[0, :, -WINDOW:, :-WINDOW]
    pool = functional.avg_pool1d if pooling == "avg" else functional.max_pool1d
    pooled = pool(attention.sum(1)[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]
    pooled = pooled.reshape(kv_heads, groups, -1).sum(1)
    pooled = pooled.sum(0, keepdim=True).expand(kv_heads, -1) if shared else pooled
    # Equal votes, which pooling by maximum makes, go to the earlier token.
    ranked = pooled.sort(descending=True, stable=True).indices
    chosen = [sorted(head[: BUDGET - WINDOW].tolist()) for head in ranked]
    return [[*head, *range(n - WINDOW, n)] for head in chosen]


def kept(fed: Fed, row: int = 0) -> list[list[int]]:
    return [lane.tolist() for lane in fed.layer.segment.positions(row)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (6, 1), (8, 4)])
@pytest.mark.parametrize("kernel", [1, 5, 7])
@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("per_head", [True, False])
def test_kept_tokens_equal_the_published_lines(heads, kv_heads, kernel, pooling, per_head):
    fed = Fed(f"{SPEC}, kernel={kernel}, pooling='{pooling}', per_head={per_head})", heads, kv_heads, rows=2)
    fed.feed(N)
    for row in range(2):
        assert kept(fed, row) == slow(fed, N, row, kernel, pooling, shared=not per_head)
    assert fed.layer.activity.dropped == 2 * (N - BUDGET)


@pytest.mark.parametrize("passes", [[40, 24], [60, 4], [57, 3, 4], [16] * 4, [63, 1]], ids=str)
def test_an_announced_prompt_votes_once_with_its_last_queries(passes):
    fed = Fed(f"{SPEC})", n=N)
    at = 0
    for count in passes:
        at += count
        # A single token in the middle of a prompt is not a generated one.
        places = fed.layer.activity.dropped
        assert places == 0
        _feed(fed, count, N - at)
    assert kept(fed) == slow(fed, N)


@pytest.mark.parametrize("passes", [[40, 24], [60, 4], [16] * 4], ids=str)
@pytest.mark.parametrize("per_head", [True, False])
def test_votes_of_several_passes_are_added_up_before_each_head_pools_them_by_maximum(passes, per_head):
    fed = Fed(f"{SPEC}, pooling='max', per_head={per_head})", heads=6, kv_heads=2)
    at = 0
    for count in passes:
        at += count
        _feed(fed, count, N - at)
    assert kept(fed) == slow(fed, N, pooling="max", shared=not per_head)


def _feed(fed: Fed, count: int, prompt_left: int | None) -> Tensor:
    attend = fed.layer.attend
    fed.layer.attend = lambda step: attend(type(step)(**{**vars(step), "prompt_left": prompt_left, "decode": False}))
    try:
        return fed.feed(count)
    finally:
        fed.layer.attend = attend


@pytest.mark.parametrize("length", [1, WINDOW, BUDGET - 1, BUDGET])
def test_prompts_that_fit_are_kept_whole(length):
    net = tiny.model()
    cache = tiny.cache(net, f"{SPEC})")
    got = tiny.generate(net, tiny.ids(2, length), cache, max_new_tokens=30)
    assert torch.equal(got.sequences, tiny.generate(tiny.model(), tiny.ids(2, length), max_new_tokens=30).sequences)
    assert cache.report().layers[0].dropped == 0


def test_the_window_and_what_is_generated_stay():
    net = tiny.model()
    cache = tiny.cache(net, f"{SPEC})")
    tiny.generate(net, tiny.ids(2, N), cache, max_new_tokens=40)
    for lane in (lane for layer in range(2) for row in cache.positions(layer) for lane in row):
        assert lane[BUDGET - WINDOW :].tolist() == list(range(N - WINDOW, N + 39))
        assert bool((lane.diff() > 0).all())
    assert cache.report().layers[0].dropped == 2 * (N - BUDGET)


def test_queries_before_the_window_have_no_vote():
    one, other, late = (Fed(f"{SPEC})", n=N) for _ in range(3))
    for fed in (other, late):
        fed.key, fed.value, fed.query = one.key, one.value, one.query.clone()
    other.query[:, :, : N - WINDOW] = torch.randn_like(other.query[:, :, : N - WINDOW])
    late.query[:, :, N - WINDOW] *= -5
    for fed in (one, other, late):
        fed.feed(N)
    assert kept(one) == kept(other) != kept(late)


def test_votes_are_not_renormalised_without_the_window():
    """A head that looks at its window alone has little to say: the denominator holds the window's columns too."""
    fed = Fed(f"{SPEC}, kernel=1, per_head=False)", 2, 2, n=N)
    fed.rope.apply = lambda x, angles: x
    fed.query = torch.ones_like(fed.query)
    fed.key = 0.05 * torch.randn_like(fed.key)
    fed.key[:, 0, N - WINDOW :] = 4.0
    fed.key[:, 0, :16] += 0.5
    fed.key[:, 1, 16:32] += 0.1
    fed.feed(N)
    assert kept(fed)[0][: BUDGET - WINDOW] == list(range(16, 32))


def test_the_logits_of_the_prompt_are_exact():
    expected = tiny.feed(tiny.model(), None, tiny.ids(2, N))
    net = tiny.model()
    cache = tiny.cache(net, f"{SPEC})")
    torch.testing.assert_close(tiny.feed(net, cache, tiny.ids(2, N)), expected, atol=1e-4, rtol=1e-4)
    assert cache.report().layers[1].dropped == 2 * (N - BUDGET)


def test_the_next_turn_votes_anew_on_all_that_is_held():
    fed = Fed(f"{SPEC}, kernel=1)", n=120)
    fed.feed(N)
    for _ in range(6):
        fed.feed(1)
    before = kept(fed)
    assert all(len(head) == BUDGET + 6 for head in before)
    fed.feed(20)
    query, key = fed.rotated(fed.query, 82, 90)[0].double(), fed.rotated(fed.key, 0, 90)[0].double()
    for head, held in enumerate(before):
        held = [*held, *range(70, 90)]
        votes = torch.zeros(len(held), dtype=torch.float64)
        for member in (2 * head, 2 * head + 1):
            for i in range(8):
                seen = torch.tensor(held) <= 82 + i
                logits = (key[head, held] @ query[member, i] * DIM**-0.5).masked_fill(~seen, float("-inf"))
                votes += logits.softmax(0)
        best = votes[: len(held) - WINDOW].topk(BUDGET - WINDOW).indices.sort().values
        assert kept(fed)[head] == [held[i] for i in best] + list(range(82, 90))


def test_drafts_that_are_verified_are_no_prompt():
    net = tiny.model()
    cache = tiny.cache(net, f"{SPEC})")
    cache.activate_past_recording()
    tiny.feed(net, cache, tiny.ids(1, N + 4))
    cache.crop(-4)
    plain = tiny.cache(net, f"{SPEC})")
    tiny.feed(net, plain, tiny.ids(1, N + 4)[:, :N])
    assert [lane.tolist() for lane in cache.positions(1)[0]] == [lane.tolist() for lane in plain.positions(1)[0]]
    for seed in range(4):
        tiny.feed(net, cache, tiny.ids(1, 6, seed))
        cache.crop(-3)
    assert all(len(lane) == BUDGET + 12 for lane in cache.positions(0)[0])
    assert cache.get_seq_length() == N + 12


def test_drafts_behind_an_announced_prompt_have_no_vote():
    net = tiny.model()
    one, other = (tiny.cache(net, f"{SPEC})") for _ in range(2))
    tiny.feed(net, one, tiny.ids(1, N))
    other.expect(N)
    other.activate_past_recording()
    tiny.feed(net, other, torch.cat([tiny.ids(1, N), tiny.ids(1, 5, seed=3)], dim=1))
    other.crop(-5)
    assert [lane.tolist() for lane in one.positions(0)[0]] == [lane.tolist() for lane in other.positions(0)[0]]


def _no_window(self: LastQueries, seen: Any, memory: Any) -> None:
    for row, mass in zip(seen.rows, seen.mass(), strict=True):
        memory.add(row, mass)


def _late(self: LastQueries, seen: Any, memory: Any) -> None:
    for row, mass in zip(seen.rows, seen.mass(seen.count - self.window + 1), strict=True):
        memory.add(row, mass)


@pytest.mark.parametrize("fault", [_no_window, _late])
def test_a_fault_in_the_vote_shows(monkeypatch, fault):
    monkeypatch.setattr(LastQueries, "observe", fault)
    with pytest.raises(AssertionError):
        test_kept_tokens_equal_the_published_lines(4, 2, 5, "avg", True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("snapkv(budget='many')", "budget must be"),
        ("snapkv(budget=32)", "budget must exceed the window of 32"),
        ("snapkv(window=0)", "window must be a whole number"),
        ("snapkv(window=2.5)", "window must be a whole number"),
        ("snapkv(kernel=4)", "kernel must be odd"),
        ("snapkv(pooling='median')", "pooling must be 'avg' or 'max'"),
        ("snapkv(per_head='no')", "per_head must be True or False"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)
