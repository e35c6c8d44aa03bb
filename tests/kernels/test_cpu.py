"""The compiled kernels equal the reference on random shapes, and refuse what they cannot read."""

import copy
from typing import Any

import comparisons
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import DTYPES, LENGTHS, PAGE, Case, Paged, cases, compiled

from kvote import kernels
from kvote.kernels import cpu, reference
from kvote.kernels.lanes import Lanes

pytestmark = compiled
given_cases = settings(max_examples=100, deadline=None)


def windows(data: Any, n: int, rows: int) -> tuple[int, list[int]]:
    """The first token of a call and, for each of some queries, the first that it does not see."""
    start = data.draw(st.sampled_from([0, min(1, n - 1), n // 3, n - 1]) | st.integers(0, n - 1))
    limits = st.lists(st.integers(start + 1, n) | st.just(n), min_size=1, max_size=rows)
    return start, data.draw(limits)


def pairs_of(data: Any, d: int, least: int = 0) -> int:
    """How many pairs of channels turn: all, an eighth, or any number (none where ``least`` allows)."""
    return data.draw(st.sampled_from([d // 2, d // 8]) | st.integers(least, d // 2))


@given_cases
@given(cases(), st.data())
def test_exact_votes_equal_the_reference(case, data):
    comparisons.votes_equal_the_reference(case, *windows(data, case.n, 4))


@given_cases
@given(cases(), st.sampled_from([4, 8]), st.data())
def test_sketched_votes_are_those_of_what_the_sketch_stands_for(case, bits, data):
    comparisons.votes_equal_the_reference(case, *windows(data, case.n, 4), bits)


@given_cases
@given(cases(), st.sampled_from([4, 8]))
def test_a_sketch_lies_within_half_a_step_of_its_keys(case, bits):
    comparisons.sketch_stands_for_the_keys(case, bits)


@given_cases
@given(cases(), st.sampled_from([0, 4, 8]), st.data())
def test_selecting_is_voting_and_taking_the_largest(case, bits, data):
    start, limits = windows(data, case.n, 3)
    k = data.draw(st.integers(1, min(limits) - start) | st.just(min(limits) - start))
    comparisons.select_takes_the_winners_of_the_vote(case, start, limits, k, bits)


@given_cases
@given(cases(), st.sampled_from([4, 8]), st.sampled_from([1, 2, 4, 1000]), st.data())
def test_nominated_tokens_are_scored_again_with_their_keys(case, bits, times, data):
    start, limits = windows(data, case.n, 3)
    # Within the first page nobody nominates: see the contract.
    limits = [*limits[:-1], max(limits[-1], min(case.n, PAGE))]
    k = data.draw(st.integers(1, min(limits) - start))
    comparisons.select_rescores_what_was_nominated(case, start, limits, k, times * k, bits)


@given_cases
@given(
    n=st.sampled_from([*LENGTHS, 9001]),
    rows=st.integers(1, 4),
    levels=st.sampled_from([1, 3, 1000, 10**9]),
    strange=st.sampled_from(["", "nan", "-inf", "nan -inf inf -0.0"]),
    share=st.sampled_from([0.01, 0.5, 1.0]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_top_k_finds_the_largest_whatever_the_votes(n, rows, levels, strange, share, seed, data):
    random = torch.Generator().manual_seed(seed)
    votes = torch.randint(levels, (rows, n), generator=random).float() - levels // 2
    for value in strange.split():
        votes[torch.rand(rows, n, generator=random) < share / len(strange.split())] = float(value)
    comparisons.top_k_finds_the_largest(votes, data.draw(st.integers(1, n) | st.just(n)))


def test_top_k_prefers_anything_to_what_is_forbidden():
    votes = torch.full((1, 100), float("-inf"))
    votes[0, [3, 50, 99]] = torch.tensor([-1e30, 1e-30, 0.0])
    assert cpu.top_k(votes, 3).tolist() == [[3, 50, 99]]


@pytest.mark.parametrize("seed", range(4))
def test_scores_far_below_what_a_sketch_gave_them_still_decide(seed):
    pool = Paged(Case(n=300, d=64, size=1e3, seed=seed), 4)
    query = pool.query(1)
    got = cpu.select(query[0], pool.keys, pool.table(), pool.sketch, 4, 0, [300], 8, 300)
    votes = reference.soft_votes(reference.scores(query, pool.key))[0, 0]
    # Heads are sure of one token each.
    assert set((votes > 0.1).nonzero()[:, 0].tolist()) <= set(got[0].tolist())


@pytest.mark.parametrize("nominate", [40, 300])
def test_a_head_whose_scores_are_infinite_leaves_the_choice_to_the_others(nominate):
    pool = Paged(Case(n=300, d=64), 4)
    query = pool.query(1)
    votes = reference.soft_votes(reference.scores(query, pool.key)[:, :, 1:])
    query[0, 0, 0, 0] = float("inf")
    got = cpu.select(query[0], pool.keys, pool.table(), pool.sketch, 4, 0, [300], 3, nominate)
    assert got.tolist() == votes[0].topk(3).indices.sort().values.tolist()


@given_cases
@given(cases(), st.sampled_from([None, 2.0, 30.0]), st.booleans(), st.data())
def test_decode_over_a_range_equals_the_reference(case, softcap, interleaved, data):
    start = data.draw(st.integers(0, case.n - 1) | st.just(0))
    pairs = 0 if case.size > 1 else pairs_of(data, case.d)
    tokens = range(start, data.draw(st.integers(start + 1, case.n) | st.just(case.n)))
    comparisons.decode_equals_the_reference(case, tokens, pairs=pairs, interleaved=interleaved, softcap=softcap)


@given_cases
@given(cases(), st.sampled_from([None, 2.0]), st.booleans(), st.data())
def test_decode_reads_each_lane_as_far_as_its_own_end(case, softcap, interleaved, data):
    start = data.draw(st.integers(0, case.n - 1) | st.just(0))
    pairs = 0 if case.size > 1 else pairs_of(data, case.d)
    lanes = case.sequences * case.heads
    ends = data.draw(st.lists(st.integers(0, case.n) | st.just(case.n), min_size=lanes, max_size=lanes))
    tokens = range(start, case.n)
    comparisons.decode_equals_the_reference(
        case, tokens, pairs=pairs, interleaved=interleaved, softcap=softcap, ends=ends
    )


@pytest.mark.parametrize("start", [0, 10])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_over_a_range_answers_the_same_bits_wherever_pages_lie(dtype, start):
    answers = []
    for pages in ("run", "scattered", "mixed"):
        pool, random = Paged(Case(n=500, d=64, dtype=dtype, pages=pages)), torch.Generator().manual_seed(0)
        for held in (pool.keys, pool.values):
            held.view(-1, 64)[pool.held.flatten()] = torch.randn(1000, 64, generator=random).to(dtype)
        given = torch.randn(1, 4, 64, generator=random), pool.keys, pool.values, pool.table(), range(start, 500)
        answers.append(cpu.decode(*given, angles=None, interleaved=False, scale=0.2, softcap=None))
    for answer in answers[1:]:
        assert all(comparisons.same_bits(a, b) for a, b in zip(answers[0], answer, strict=True))


@given_cases
@given(cases(), st.sampled_from([None, 2.0]), st.booleans(), st.data())
def test_decode_over_a_list_of_each_sequence_equals_the_reference(case, softcap, interleaved, data):
    pairs = 0 if case.size > 1 else pairs_of(data, case.d)
    count = data.draw(st.integers(1, case.n) | st.just(case.n))
    comparisons.decode_equals_the_reference(case, count, pairs=pairs, interleaved=interleaved, softcap=softcap)


@pytest.mark.parametrize("tokens", [range(0), range(7, 7), 0])
def test_decode_over_no_tokens_answers_nothing(tokens):
    out, lse = comparisons.decode_equals_the_reference(Case(sequences=2), tokens)
    assert bool((out == 0).all())
    assert bool((lse == float("-inf")).all())


@given_cases
@given(cases(), st.sampled_from([None, 2.0]), st.data())
def test_attention_mass_equals_the_reference(case, softcap, data):
    comparisons.mass_equals_the_reference(case, *windows(data, case.n, 9), softcap=softcap)


@given_cases
@given(cases(), st.integers(1, 9), st.data())
def test_scores_equal_the_reference(case, rows, data):
    start, limits = windows(data, case.n, 1)
    comparisons.scores_equal_the_reference(case, start, limits[0], rows)


@given_cases
@given(cases(), st.integers(1, 5), st.data())
def test_label_scores_equal_the_reference(case, rows, data):
    start, limits = windows(data, case.n, 1)
    comparisons.scores_equal_the_reference(case, start, limits[0], rows, labels=data.draw(st.integers(1, case.d)))


@pytest.mark.parametrize("labels", [0, 7])
@pytest.mark.parametrize("start", [0, 1, 63, 64, 2047, 2049, 4299])
def test_scores_may_start_anywhere(start, labels):
    comparisons.scores_equal_the_reference(Case(n=4300, heads=2, groups=3), start, 4300, 1, labels)


@pytest.mark.parametrize("start", range(8))
def test_attention_mass_may_start_anywhere_before_a_page_that_lies_elsewhere(start):
    comparisons.mass_equals_the_reference(Case(n=4300, heads=1, groups=3), start, [4300, 900])


def test_attention_mass_of_rows_that_saw_nothing_is_nothing():
    case = Case(heads=1, groups=1)
    pool = comparisons.Paged(case)
    query, lse = pool.query(2), torch.tensor([[[float("-inf"), 0.5]]])
    got = cpu.attention_mass(query, lse, pool.keys, pool.table(), 0, [0, 9], scale=0.2, softcap=None)
    expected = reference.attention_mass(query, lse, pool.key[:, :, :9], 0, [0, 9], scale=0.2, softcap=None)
    torch.testing.assert_close(got, expected)


@given_cases
@given(cases(), st.booleans(), st.booleans(), st.booleans(), st.data())
def test_turning_equals_the_reference(case, interleaved, shared, strided, data):
    pairs = pairs_of(data, case.d, least=1)
    comparisons.turn_equals_the_reference(case, pairs, interleaved=interleaved, shared=shared, strided=strided)


@given_cases
@given(cases(), st.booleans(), st.data())
def test_gather_fetches_listed_tokens_and_turns_their_keys(case, interleaved, data):
    count = data.draw(st.integers(0, case.n) | st.just(case.n))
    comparisons.gather_fetches_and_turns(case, count, pairs_of(data, case.d), interleaved)


@given_cases
@given(cases(), st.sampled_from([0, 4, 8]), st.sampled_from([16, 32, 128]), st.booleans(), st.data())
def test_append_stores_tokens_behind_lanes_of_any_length(case, bits, value_dim, strided, data):
    count = data.draw(st.integers(0, case.n) | st.just(1))
    comparisons.append_stores_and_sketches(case, count, bits=bits, value_dim=value_dim, strided=strided)


@pytest.mark.parametrize("shape", [(70, 32), (2, 70, 32), (3, 2, 70, 32)])
@pytest.mark.parametrize("angles", [(70, 16), (1, 16), (70, 8), (3, 1, 70, 16), (1, 1, 70, 16)])
def test_rotation_equals_the_reference_whichever_kernel_it_takes(shape, angles):
    x, angle = torch.randn(shape), torch.randn(angles)
    got = kernels.rotate(x, angle.cos(), angle.sin())
    torch.testing.assert_close(got, reference.rotate(x, angle.cos(), angle.sin()), atol=2e-6, rtol=2e-6)


def test_nothing_in_gives_nothing_out():
    empty = Case(n=1)
    comparisons.gather_fetches_and_turns(empty, 0)
    comparisons.append_stores_and_sketches(empty, 0, bits=8)
    assert cpu.rotate(torch.empty(1, 2, 0, 32), (torch.empty(1, 0, 16), torch.empty(1, 0, 16)), False).shape[2] == 0
    assert cpu.top_k(torch.empty(0, 5), 3).shape == (0, 3)


@pytest.mark.parametrize("bits", [4, 8])
def test_queries_meet_a_sketch_in_127_steps(bits):
    pool = comparisons.Paged(Case(n=1000), bits)
    query = 0.3 * pool.query(1)
    got = cpu.votes(query[0], pool.keys, pool.table(), pool.sketch, bits, 0, [1000])
    logits = reference.scores(reference.sketched_query(query), comparisons.sketched(pool, bits))
    torch.testing.assert_close(got, reference.soft_votes(logits)[0], rtol=2e-3, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e6, 1e12, 5e37])
@pytest.mark.parametrize("of_query", [1e-40, 1e-7, 1.0])
def test_sketches_of_tiny_and_huge_numbers_invent_no_nan(bits, size, of_query):
    pool = comparisons.Paged(Case(heads=1, groups=1, size=size), bits)
    assert bool(pool.key.isfinite().all())
    got = cpu.votes(of_query * pool.query(1)[0], pool.keys, pool.table(), pool.sketch, bits, 0, [100])
    torch.testing.assert_close(got.sum(), torch.tensor(1.0), atol=1e-3, rtol=0)


def test_lanes_are_never_copied_and_keep_their_addresses():
    lanes = Lanes([[(3, 2), (9, 1)], [], [(0, 1)]])
    assert copy.deepcopy(lanes) is lanes
    assert lanes.count == 3
    assert lanes.begins.tolist() == [0, 2, 2, 3]
    assert lanes.runs.tolist() == [[3, 2], [9, 1], [0, 1]]
    assert lanes.address == (lanes.runs.ctypes.data, lanes.begins.ctypes.data, 3)
    assert Lanes([]).runs.shape == (0, 2)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(2, 64), None),
        (torch.zeros(2, 64, dtype=torch.float64), "torch.float64 is not read"),
        (torch.zeros(2, 24), "the head size 24 is not a multiple of 16 up to 256"),
        (torch.zeros(2, 272), "the head size 272 is not a multiple of 16 up to 256"),
        (torch.zeros(2, 64, device="meta"), "tensors are on meta"),
    ],
)
def test_what_cannot_be_read_is_said(tensor, reason):
    assert cpu.why_not(tensor) == reason


def refusals() -> dict[str, Any]:
    pool = comparisons.Paged(Case(n=70, groups=2))
    keys, values, lanes = pool.keys, pool.values, pool.table()
    query, token = torch.zeros(4, 1, 32), torch.zeros(1, 2, 1, 32)
    kwargs: dict[str, Any] = {"angles": None, "interleaved": False, "scale": 1.0, "softcap": None}
    angles = torch.zeros(1, 70, 16), torch.zeros(1, 70, 16)
    pools, at = (keys, values, torch.zeros(len(keys), 64, dtype=torch.int32)), torch.zeros(1, 1, dtype=torch.int64)
    short = torch.zeros(1, 3, dtype=torch.int32)
    return {
        "candidates": lambda: cpu.votes(query, keys, lanes, None, 0, 5, [5]),
        "query's head size": lambda: cpu.votes(query[..., :16], keys, lanes, None, 0, 0, [5]),
        "one limit per query row, and candidates": lambda: cpu.votes(query, keys, lanes, None, 0, 0, [5, 6]),
        "cannot take 6 of 5 candidates": lambda: cpu.select(query, keys, lanes, None, 0, 0, [5], 6),
        "cannot take 4 of 3": lambda: cpu.top_k(torch.zeros(1, 3), 4),
        "cannot take 0 of 3": lambda: cpu.top_k(torch.zeros(1, 3), 0),
        "index must be": lambda: cpu.gather(keys, values, lanes, short[0], angles, False, (keys, values)),
        "out must be": lambda: cpu.gather(keys, values, lanes, at[0], angles, False, (keys.half(), values)),
        "tokens must be": lambda: cpu.decode(query[None, :, 0], keys, values, lanes, short, **kwargs),
        "one list per sequence": lambda: cpu.decode(query[None, :, 0], keys, values, lanes, at.repeat(2, 1), **kwargs),
        "same head size": lambda: cpu.decode(query[None, :, 0], keys, values[..., :16], lanes, range(9), **kwargs),
        "more than 16": lambda: cpu.decode(query.repeat(9, 1, 1)[None, :, 0], keys, values, lanes, range(9), **kwargs),
        "angles must fit": lambda: cpu.rotate(token, angles, False),
        "angles must be float32": lambda: cpu.rotate(pool.key, (angles[0].double(), angles[1].double()), False),
        "channels must be contiguous": lambda: cpu.append(
            token.transpose(-1, -2).expand(-1, -1, -1, 32), token, at, pools, lanes, [0, 0], None, 0
        ),
        "dtypes must be": lambda: cpu.append(token.half(), token, at, pools, lanes, [0, 0], None, 0),
        "positions must be": lambda: cpu.append(token, token, at.int(), pools, lanes, [0, 0], None, 0),
        "one lane per sequence": lambda: cpu.append(token, token, at, pools, lanes, [0], None, 0),
        "the query's channels": lambda: cpu.scores(query[None, ..., :16], keys, lanes, 0, 9),
        "of the query's channels": lambda: cpu.label_scores(query[None], keys.transpose(1, 2), lanes, 0, 9),
        "there must be tokens": lambda: cpu.scores(query[None], keys, lanes, 9, 8),
        "a lane for each head": lambda: cpu.scores(query[None, :3], keys, lanes, 0, 9),
        "one limit per query row": lambda: cpu.attention_mass(
            query[None], torch.zeros(1, 4, 1), keys, lanes, 0, [3, 4], scale=1.0, softcap=None
        ),
    }


@pytest.mark.parametrize("reason", refusals() if cpu.why_not() is None else [])
def test_what_would_be_read_wrongly_is_refused(reason):
    with pytest.raises(ValueError, match=reason):
        refusals()[reason]()


def test_an_instruction_set_that_does_not_exist_is_not_used():
    active = cpu.instruction_set()
    assert not cpu.use("nonsense")
    assert cpu.instruction_set() == active == cpu.instruction_sets()[-1]


def test_all_memory_is_read():
    memory = torch.arange(4096, dtype=torch.int32)
    cpu.use_large_pages(memory)
    cpu.read_all(memory)
