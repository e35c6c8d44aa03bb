"""KVCrush: the proofs of its card (arXiv 2503.00022)."""

import time

import pytest
import tiny
import torch
from selecting import DIM, Fed
from watching import received, weights

from kvote import MethodError
from kvote.keep import representatives
from kvote.keep.representatives import Representatives, anchor, distance, signatures
from kvote.spec import parse

N, BUDGET, WINDOW = 64, 26, 6
SPEC = f"kvcrush(budget={BUDGET}, window={WINDOW}, kernel=1"
CHOSEN = BUDGET - WINDOW


def slow(fed: Fed, crush: float, bits: list[bool]) -> list[list[int]]:
    """The rules token by token: what every key head holds."""
    heads = fed.key.shape[1]
    whole = weights(fed.rotated(fed.query, 0, N), fed.rotated(fed.key, 0, N), DIM**-0.5)
    votes = received(whole[:, :, -WINDOW:], heads)[0, :, : N - WINDOW].tolist()
    tokens = range(N - WINDOW)
    ranked = [sorted(tokens, key=lambda t, own=own: -own[t]) for own in votes]
    far = [sum((t in top[: len(tokens) // 2]) != bit for top, bit in zip(ranked, bits, strict=True)) for t in tokens]
    spread, found = int(CHOSEN * crush), []
    for top in ranked:
        kept, rest = top[: CHOSEN - spread], sorted(top[CHOSEN - spread :])
        rest = sorted(rest, key=lambda t: far[t])
        kept += [rest[i * len(rest) // spread] for i in range(spread)]
        found.append(sorted(kept) + list(range(N - WINDOW, N)))
    return found


def kept(fed: Fed) -> list[list[int]]:
    return [lane.tolist() for lane in fed.layer.segment.positions(0)]


BITS = {"zeros": [False] * 4, "ones": [True] * 4, "alternating": [False, True, False, True]}


@pytest.mark.parametrize("mode", BITS)
@pytest.mark.parametrize("crush", [0.25, 0.5, 1.0])
def test_kept_tokens_equal_the_rules_token_by_token(mode, crush):
    fed = Fed(f"{SPEC}, crush={crush}, anchor='{mode}')", 8, 4)
    fed.feed(N)
    assert kept(fed) == slow(fed, crush, BITS[mode])
    assert fed.layer.activity.dropped == N - BUDGET


def test_without_representatives_it_is_snapkv_and_with_them_the_best_of_snapkv_and_others():
    feds = [
        Fed(f"{name}, window={WINDOW})", 8, 4)
        for name in (
            f"kvcrush(budget={BUDGET}, crush=0.0",
            f"kvcrush(budget={BUDGET}",
            f"snapkv(budget={BUDGET}",
            f"snapkv(budget={BUDGET - 5}",
        )
    ]
    for fed in feds:
        fed.query, fed.key, fed.value = feds[0].query, feds[0].key, feds[0].value
        fed.feed(N)
    none, some, snapkv, smaller = map(kept, feds)
    assert none == snapkv
    assert some != snapkv
    for lane, base in zip(some, smaller, strict=True):
        assert set(base) < set(lane)
        assert len(set(lane)) == BUDGET


@pytest.mark.parametrize("n", [1, 2, 9, 10])
def test_exactly_half_of_the_bits_of_a_head_are_set_also_among_equals(n):
    for worth in (torch.randn(3, n), torch.ones(3, n)):
        bits = signatures(worth)
        assert bits.sum(dim=1).tolist() == [n // 2] * 3
    assert bits[0].tolist() == [True] * (n // 2) + [False] * (n - n // 2)


def test_distances_are_those_of_hamming():
    bits = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1], [1, 0, 0]]).bool()
    assert distance(bits, anchor("zeros", 4, 0)).tolist() == bits.sum(0).tolist() == [3, 1, 2]
    assert distance(bits, anchor("ones", 4, 0)).tolist() == [1, 3, 2]
    assert distance(bits, anchor("alternating", 4, 0)).tolist() == [1, 1, 4]
    drawn = [anchor("random", 64, seed).tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_cost_is_linear_in_tokens():
    worth = torch.rand(4, 200_000)
    begin = time.process_time()
    found = Representatives(0.25, "alternating", 0).chosen(worth, 2048)
    # Pairs of tokens would be 40 billion.
    assert time.process_time() - begin < 20
    assert found.shape == (4, 2048)


def test_a_budget_that_covers_the_text_is_dense_attention():
    net = tiny.model()
    got = tiny.generate(net, tiny.ids(2, 40), tiny.cache(net, "kvcrush(budget=48, window=6)"))
    expected = tiny.generate(tiny.model(), tiny.ids(2, 40))
    assert torch.equal(got.sequences, expected.sequences)


FAULTS = {
    "bits by a threshold": ("signatures", lambda worth: worth > worth.mean()),
    "no distance": ("distance", lambda bits, anchor: torch.zeros(bits.shape[1], dtype=torch.int64)),
    "another anchor": ("anchor", lambda mode, heads, seed: torch.tensor([True, False, False, True])),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(monkeypatch, fault):
    monkeypatch.setattr(representatives, *FAULTS[fault])
    with pytest.raises(AssertionError):
        test_kept_tokens_equal_the_rules_token_by_token("alternating", 0.5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kvcrush(crush=1.5)", "crush must be a share"),
        ("kvcrush(anchor='mean')", "anchor must be one of random"),
        ("kvcrush(seed=-1)", "seed must be a whole number"),
        ("kvcrush(kernel=4)", "kernel must be odd"),
        ("kvcrush | h2o", "both decide what to keep"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)
