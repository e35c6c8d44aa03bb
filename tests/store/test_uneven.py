"""Lanes that differ in length: heads of a sequence, and sequences that are answered in one call."""

from typing import Any

import pytest
import tiny
import torch

from kvote import MethodError, kernels
from kvote.keep.allocate.over_heads import CompetingHeads
from kvote.keep.budget import Budget
from kvote.keep.evict import Evict
from kvote.keep.score.attention_received import AttentionReceived
from kvote.keep.score.key_norm import KeyNorm
from kvote.keep.score.recency import Recency
from kvote.method import Method
from kvote.store.segment import Scaling
from kvote.store.uncompressed import Uncompressed
from kvote.tokens import Queries, TokenSet

D, HEADS, N = 16, 3, 150


def segment(keep: list[list[int]]) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """One of which each head has only some tokens of ``N``, and what those were."""
    held = Uncompressed().new_segment(HEADS, torch.empty(0, D), D, None)
    held.add_sequences(1)
    key, value = torch.randn(1, HEADS, N, D), torch.randn(1, HEADS, N, D)
    held.append([0], key, value, torch.arange(N)[None])
    most = max(map(len, keep))
    held.keep(0, torch.tensor([[-1] * (most - len(own)) + own for own in keep]))
    return held, key, value


KEEP = [list(range(0, 140, 2)), [], [5, 149]]


def test_each_head_holds_its_own_tokens_and_new_ones_go_behind_them():
    held, _, _ = segment(KEEP)
    held.append([0], torch.randn(1, HEADS, 2, D), torch.randn(1, HEADS, 2, D), torch.tensor([[150, 151]]))
    assert [lane.tolist() for lane in held.positions(0)] == [[*own, 150, 151] for own in KEEP]
    assert held.length(0) == 72
    assert held.lengths(0) == [72, 2, 4]
    held.truncate(0, 71)
    held.keep(0, torch.tensor([[0, 1], [-1, 70], [68, 69]]))
    assert [lane.tolist() for lane in held.positions(0)] == [[0, 2], [150], [5, 149]]


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("cut", [0, 69])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_range_is_read_in_each_head_from_its_end(t, cut, softcap):
    held, key, value = segment(KEEP)
    query, logits = torch.randn(1, 2 * HEADS, t, D), Scaling(0.3, softcap)
    tokens = TokenSet(range(cut, 70), causal=False)
    out, lse = held.attend(Queries(query), [0], tokens, logits)
    mass = held.attention_mass(Queries(query), lse, [0], tokens, logits)
    scores = held.scores(query, [0], cut, 70)
    found = held.decode([0], cut, 70)
    for head, own in enumerate(KEEP):
        its = own[max(0, len(own) - (70 - cut)) :]
        heads = slice(2 * head, 2 * head + 2)
        mine, theirs = key[:, head : head + 1, its], value[:, head : head + 1, its]
        wanted, total = kernels.reference.attend(query[:, heads], mine, theirs, scale=0.3, softcap=softcap)
        torch.testing.assert_close(out[:, heads], wanted)
        torch.testing.assert_close(lse[:, heads], total)
        empty = 70 - cut - len(its)
        assert bool((mass[0, head, 0, :empty] == 0).all())
        assert float(mass[0, head].sum()) == pytest.approx(2 * t if its else 0, abs=1e-4)
        assert bool((scores[0, :, heads, :empty] == float("-inf")).all())
        torch.testing.assert_close(found[0][0, head, empty:], mine[0, 0])
        assert bool((found[1][0, head, :empty] == 0).all())


def test_lists_are_refused():
    held, _, _ = segment(KEEP)
    with pytest.raises(ValueError, match="by ranges only"):
        held.attend(Queries(torch.randn(1, HEADS, 1, D)), [0], TokenSet(torch.zeros(1, 1, 1).long()), Scaling(1.0))


@pytest.mark.parametrize("score", [AttentionReceived(), KeyNorm()], ids=["received", "keys"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_any_score_of_single_tokens_may_divide_a_budget_over_heads(score, sinks):
    """While generating, too: of the tokens held and the new one, those worth most stay."""
    net = tiny.model()
    keep = Evict(score, Budget(20), window=4, sinks=sinks, burst=1, over_heads=CompetingHeads(0.0))
    cache = tiny.cache(net, lambda net: Method(keep=keep))
    tiny.feed(net, cache, tiny.ids(2, 60))
    tiny.feed(net, cache, tiny.ids(2, 30, seed=1), passes=1)
    differ = 0
    for layer in range(2):
        for row in cache.positions(layer):
            lanes = [lane.tolist() for lane in row]
            assert all(lane[:sinks] == list(range(sinks)) for lane in lanes)
            assert all(lane[-4:] == [86, 87, 88, 89] for lane in lanes)
            assert sum(map(len, lanes)) == 40
            differ += len(lanes[0]) != len(lanes[1])
    assert differ


def test_a_score_that_does_not_say_that_heads_may_differ_is_refused():
    for score in (Recency(per_head=True), AttentionReceived(per_head=False)):
        with pytest.raises(MethodError, match=r"heads may differ in length \(uneven\)"):
            Evict(score, Budget(20), over_heads=CompetingHeads(0.2))


def counted(cache: Any) -> list[str]:
    """Names of what is asked of the kernels from now on, in all layers."""
    calls: list[str] = []

    class Counting:
        def __init__(self, own: Any) -> None:
            self.own = own

        def __getattr__(self, name: str) -> Any:
            calls.append(name)
            return getattr(self.own, name)

    for layer in cache.managed:
        layer.segment.kernels = Counting(layer.segment.kernels)
    return calls


@pytest.mark.skipif(kernels.backend() == "reference", reason="the law fetches tokens first")
@pytest.mark.parametrize("method", ["dense", "snapkv(budget=20, window=6)", "adakv(budget=20, window=6)"])
def test_rows_of_any_lengths_are_answered_in_one_call(method):
    net, (tokens, mask) = tiny.model(), tiny.padded(3, 70, [11, 0, 66])
    cache = tiny.cache(net, method)
    tiny.feed(net, cache, tokens, mask)
    calls = counted(cache)
    more, seen = tiny.ids(3, 1, seed=5), torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
    got = tiny.feed(net, cache, more, seen)
    assert calls.count("decode") == calls.count("append") == 2
    for row, pads in enumerate((11, 0, 66)):
        alone = tiny.cache(net, method)
        tiny.feed(net, alone, tokens[row : row + 1, pads:])
        expected = tiny.feed(net, alone, more[row : row + 1])
        torch.testing.assert_close(got[row : row + 1], expected, atol=1e-4, rtol=1e-4)


def test_rows_are_answered_group_by_group_where_a_keeper_looks_on():
    net, (tokens, mask) = tiny.model(), tiny.padded(3, 70, [11, 0, 66])
    cache = tiny.cache(net, "h2o(budget=500)")
    tiny.feed(net, cache, tokens, mask)
    calls = counted(cache)
    tiny.feed(net, cache, tiny.ids(3, 1, seed=5), torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1))
    assert calls.count("append") == 2 * 3
