"""Selection in one call equals votes and top-k one after the other, and a sketch that nominates leaves the last word to
the keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fast import DTYPES, Paged, compiled

from kvote.kernels import cpu, reference
from kvote.store.pages import PAGE

pytestmark = compiled


def sketch_of(pool: Paged, bits: int) -> torch.Tensor | None:
    if bits == 0:
        return None
    d = pool.keys.shape[-1]
    sketch = torch.zeros(len(pool.keys), PAGE // cpu.SKETCH_TOKENS * cpu.sketch_bytes(d, bits), dtype=torch.uint8)
    cpu.sketch(pool.keys, sketch, bits, torch.arange(len(pool.keys) * PAGE))
    return sketch


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([63, 64, 100, 1000, 4097]),
    heads=st.integers(1, 3),
    groups=st.integers(1, 8),
    d=st.sampled_from([16, 32, 80, 128]),
    dtype=st.sampled_from(DTYPES),
    bits=st.sampled_from([0, 4, 8]),
    data=st.data(),
)
def test_a_selection_is_votes_and_top_k(n, heads, groups, d, dtype, bits, data):
    pool = Paged(heads, n, d, dtype, data.draw(st.integers(0, 9)))
    start = data.draw(st.integers(0, n // 2))
    limits = sorted(data.draw(st.lists(st.integers(n // 2 + 1, n), min_size=1, max_size=3)))
    k = data.draw(st.integers(1, limits[0] - start))
    query = torch.randn(heads * groups, len(limits), d) / d**0.5
    arguments = (query, pool.keys, pool.lanes, sketch_of(pool, bits), bits, start, limits)
    votes = reference.forbid(cpu.votes(*arguments)[None], start, limits)[0]
    assert torch.equal(cpu.select(*arguments, k), cpu.top_k(votes, k) + start)


@pytest.mark.parametrize("bits", [4, 8])
def test_sketched_votes_are_those_of_the_sketched_keys(bits):
    pool = Paged(2, 700, 64, torch.bfloat16, 1)
    query = torch.randn(8, 1, 64) / 4
    got = cpu.votes(query, pool.keys, pool.lanes, sketch_of(pool, bits), bits, 5, [690])
    rough = reference.scores(reference.sketched_query(query)[None], reference.sketched(pool.key, bits)[:, :, 5:690])
    expected = reference.soft_votes(rough)[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=5e-3)


@pytest.mark.parametrize("selections", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nominated_tokens_are_judged_by_their_keys(dtype, bits, selections):
    n, start, k, nominate = 3000, 11, 100, 500
    pool = Paged(3, n, 64, dtype, 2)
    limits = [n - 200 + 50 * i for i in range(selections)]
    query = torch.randn(12, selections, 64) / 2
    arguments = (query, pool.keys, pool.lanes, sketch_of(pool, bits), bits, start, limits)
    got = cpu.select(*arguments, k, nominate)
    votes = reference.forbid(cpu.votes(*arguments)[None], start, limits)[0]
    nominated = cpu.top_k(votes, nominate)
    key = pool.key[:, :, start : limits[-1]].float()
    rough = reference.scores(reference.sketched_query(query)[None], reference.sketched(key, bits))
    rough = reference.forbid(rough, start, limits)[0]
    exact = reference.scores(query[None], key)[0].gather(-1, nominated[:, None].expand(-1, 12, -1))
    again = reference.rescored(rough, exact, nominated)
    expected = nominated.gather(-1, reference.top_k(again, k)) + start
    for mine, law in zip(got.tolist(), expected.tolist(), strict=True):
        assert len(set(mine) & set(law)) >= k - 1
        assert mine == sorted(mine)


def test_what_is_nominated_by_all_is_decided_by_the_keys_alone():
    pool = Paged(2, 900, 64, torch.bfloat16, 3)
    query = torch.randn(8, 1, 64)
    exact = cpu.select(query, pool.keys, pool.lanes, None, 0, 3, [890], 60)
    rough = cpu.select(query, pool.keys, pool.lanes, sketch_of(pool, 4), 4, 3, [890], 60)
    again = cpu.select(query, pool.keys, pool.lanes, sketch_of(pool, 4), 4, 3, [890], 60, nominate=887)
    assert not torch.equal(rough, exact)
    assert len(set(again.flatten().tolist()) & set(exact.flatten().tolist())) >= 59


def test_more_winners_than_candidates_are_refused():
    pool = Paged(1, 100, 32, torch.float32, 0)
    with pytest.raises(ValueError, match="cannot take 60 of 50"):
        cpu.select(torch.randn(2, 1, 32), pool.keys, pool.lanes, None, 0, 10, [60], 60)
