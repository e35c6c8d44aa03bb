"""Key norms: the proofs that it keeps what has the smallest keys (arXiv 2406.11430)."""

import pytest
import tiny
import torch
from selecting import Fed

from kvote import MethodError
from kvote.keep import evict, keeper
from kvote.spec import parse

N, BUDGET = 64, 20


def slow(fed: Fed, n: int, budget: int = BUDGET, shared: bool = False) -> list[list[int]]:
    """A line per head: the smallest norms of all but the newest token, and that one."""
    norms = fed.key[0, :, : n - 1].double().norm(dim=-1)
    norms = norms.sum(0, keepdim=True).expand(len(norms), -1) if shared else norms
    return [[*sorted(head.argsort()[: budget - 1].tolist()), n - 1] for head in norms]


def kept(fed: Fed) -> list[list[int]]:
    return [lane.tolist() for lane in fed.layer.segment.positions(0)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (6, 1)])
@pytest.mark.parametrize("per_head", [True, False])
def test_the_smallest_keys_stay_whatever_their_rotation(heads, kv_heads, per_head):
    fed = Fed(f"knorm(budget={BUDGET}, per_head={per_head})", heads, kv_heads)
    fed.feed(N)
    assert kept(fed) == slow(fed, N, shared=not per_head)
    assert fed.layer.activity.dropped == N - BUDGET


def test_generated_tokens_make_the_largest_keys_go_one_by_one():
    fed = Fed(f"knorm(budget={BUDGET})")
    fed.feed(40)
    for n in range(41, N + 1):
        before = kept(fed)
        fed.feed(1)
        for head, held in enumerate(before):
            norms = fed.key[0, head].norm(dim=-1)
            largest = max(held, key=lambda token: norms[token].item())
            assert kept(fed)[head] == [token for token in held if token != largest] + [n - 1]


def test_generated_tokens_come_on_top_if_they_shall():
    fed = Fed(f"knorm(budget={BUDGET}, evict_generated=False)")
    fed.feed(40)
    expected = [[*head, *range(40, N)] for head in slow(fed, 40)]
    for _ in range(40, N):
        fed.feed(1)
    assert kept(fed) == expected


def test_it_looks_at_no_attention_and_remembers_nothing():
    net = tiny.model()
    cache = tiny.cache(net, f"knorm(budget={BUDGET})")
    tiny.feed(net, cache, tiny.ids(2, N))
    assert all(layer.record.memory is None for layer in cache.managed)
    assert all(layer.dropped == 2 * (N - BUDGET) for layer in cache.report().layers)


def test_norms_of_a_long_text_are_taken_piece_by_piece(monkeypatch):
    whole, pieces = Fed("knorm(budget=20)"), Fed("knorm(budget=20)")
    pieces.key = whole.key
    whole.feed(N)
    monkeypatch.setattr(keeper, "_TOKENS_HELD", 7)
    pieces.feed(N)
    assert kept(pieces) == kept(whole)


def test_the_smallest_keys_of_encoded_tokens_are_found_too():
    net, tokens = tiny.model(), tiny.ids(1, 200)
    cache = tiny.cache(net, "knorm(budget=96, evict_generated=False) | kivi(residual=32)")
    tiny.generate(net, tokens, cache)
    assert cache.report().layers[0].dropped == 200 - 96
    with pytest.raises(MethodError, match="dropped while generating"):
        parse("knorm | kivi")


def test_a_fault_in_the_choice_shows(monkeypatch):
    monkeypatch.setattr(evict.kernels, "top_k", lambda worth, k: (-worth).topk(k).indices.sort().values)
    with pytest.raises(AssertionError):
        test_the_smallest_keys_stay_whatever_their_rotation(4, 2, True)


def test_covering_everything_equals_dense():
    expected = tiny.generate(tiny.model(), tiny.ids(2, N)).sequences
    net = tiny.model()
    assert torch.equal(tiny.generate(net, tiny.ids(2, N), tiny.cache(net, "knorm(budget=100)")).sequences, expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("knorm(budget=0)", "budget must be"),
        ("knorm(budget=1)", "budget must exceed the window of 1"),
        ("knorm(per_head='no')", "per_head must be True or False"),
        ("knorm(evict_generated=1)", "evict_generated must be True or False"),
        ("knorm(burst=65)", "burst must be a whole number"),
        ("knorm | tokenselect", "differ from head to head"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)
