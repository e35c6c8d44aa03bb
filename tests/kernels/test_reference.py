"""The law of the kernels, against loops that nobody can misread."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvote.kernels import reference
from kvote.kernels.masks import additive, end_aligned

CPU = torch.device("cpu")


def qkv(heads: int, groups: int, t: int, m: int, d: int = 8, dv: int = 5, b: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(b, heads * groups, t, d), torch.randn(b, heads, m, d), torch.randn(b, heads, m, dv)


def naive(query: Tensor, key: Tensor, value: Tensor, b: int, head: int, row: int, seen: list[int], **kw) -> tuple:
    """One row of attention, token by token."""
    kv = head // (query.shape[1] // key.shape[1])
    logits = []
    for token in seen:
        logit = kw["scale"] * float(sum(query[b, head, row] * key[b, kv, token]))
        cap = kw.get("softcap")
        logit = cap * math.tanh(logit / cap) if cap else logit
        logits.append(logit + (float(kw["bias"][b, kv, token]) if "bias" in kw else 0.0))
    total = sum(math.exp(x) for x in logits)
    out = sum(math.exp(x) / total * value[b, kv, token] for x, token in zip(logits, seen, strict=True))
    return out, math.log(total)


@pytest.mark.parametrize("groups", [1, 4, 7])
@pytest.mark.parametrize("extra", ["plain", "softcap", "bias"])
def test_attention_equals_a_loop(groups, extra):
    query, key, value = qkv(2, groups, 3, 7)
    kw = {"scale": 0.3, **{"softcap": {"softcap": 2.0}, "bias": {"bias": torch.randn(2, 2, 7)}}.get(extra, {})}
    mask = end_aligned(3, 7, None, CPU)
    out, lse = reference.attend(query, key, value, mask=mask, **kw)
    for b, head, row in torch.cartesian_prod(torch.arange(2), torch.arange(2 * groups), torch.arange(3)).tolist():
        one, total = naive(query, key, value, b, head, row, list(range(5 + row)), **kw)
        torch.testing.assert_close(out[b, head, row], one, atol=1e-5, rtol=1e-5)
        assert lse[b, head, row].item() == pytest.approx(total, abs=1e-5)


def test_attention_equals_torch():
    query, key, value = qkv(2, 3, 9, 9, dv=8)
    out, _ = reference.attend(query, key, value, scale=0.25, mask=end_aligned(9, 9, None, CPU))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    expected = sdpa(query, key, value, is_causal=True, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_a_row_that_sees_nothing_answers_nothing():
    query, key, value = qkv(1, 2, 2, 3)
    out, lse = reference.attend(query, key, value, scale=1.0, mask=torch.tensor([[False] * 3, [True] * 3]))
    assert bool((out[:, :, 0] == 0).all())
    assert bool((lse[:, :, 0] == float("-inf")).all())
    assert bool(lse[:, :, 1].isfinite().all())
    out, lse = reference.attend(query, key[:, :, :0], value[:, :, :0], scale=1.0)
    assert bool((out == 0).all())
    assert bool((lse == float("-inf")).all())


def test_each_batch_entry_may_have_its_own_mask():
    query, key, value = qkv(1, 1, 2, 4)
    masks = torch.tensor([[[True, False, False, True]] * 2, [[True] * 4] * 2])
    out, _ = reference.attend(query, key, value, scale=1.0, mask=masks)
    for b in range(2):
        alone, _ = reference.attend(query[b : b + 1], key[b : b + 1], value[b : b + 1], scale=1.0, mask=masks[b])
        torch.testing.assert_close(out[b : b + 1], alone)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.data())
def test_merging_any_partition_gives_the_whole(m, data):
    query, key, value = qkv(2, 2, 3, m)
    part = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=m, max_size=m)))
    answers = [reference.attend(query, key[:, :, part == p], value[:, :, part == p], scale=1.0) for p in range(4)]
    out, lse = reference.merge(answers)
    whole = reference.attend(query, key, value, scale=1.0)
    torch.testing.assert_close(out, whole[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, whole[1], atol=1e-5, rtol=1e-5)


def test_merging_parts_that_saw_nothing_gives_nothing():
    empty = torch.zeros(1, 2, 3, 4), torch.full((1, 2, 3), float("-inf"))
    out, lse = reference.merge([empty, empty])
    assert bool((out == 0).all())
    assert bool((lse == float("-inf")).all())


def test_sink_logits_equal_a_softmax_with_one_more_column():
    query, key, value = qkv(2, 2, 3, 6)
    sinks = torch.tensor([-1.0, 0.5, 2.0, 9.0])
    got = reference.with_sink_logits(*reference.attend(query, key, value, scale=1.0), sinks)
    logits = torch.einsum("bhtd,bhmd->bhtm", query, key.repeat_interleave(2, 1))
    wider = torch.cat([logits, sinks.reshape(1, 4, 1, 1).expand(2, 4, 3, 1)], dim=-1)
    expected = torch.softmax(wider, dim=-1)[..., :-1] @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 4, 7])
def test_scores_pair_each_query_head_with_its_own_key_head(groups):
    query, key, _ = qkv(3, groups, 2, 11)
    got = reference.scores(query, key)
    assert got.shape == (2, 2, 3 * groups, 11)
    for head in range(3 * groups):
        expected = torch.einsum("brd,bnd->brn", query[:, head], key[:, head // groups])
        torch.testing.assert_close(got[:, :, head], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 7, 32])
def test_votes_are_softmaxes_summed_and_sum_to_the_number_of_heads(heads):
    logits = 20 * torch.randn(2, 3, heads, 50)
    votes = reference.soft_votes(logits)
    expected = sum(torch.exp(logits[:, :, h]) / torch.exp(logits[:, :, h]).sum(-1, keepdim=True) for h in range(heads))
    torch.testing.assert_close(votes, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(votes.sum(-1), torch.full((2, 3), float(heads)))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("groups", [1, 3])
def test_attention_mass_is_what_each_token_got_from_all_queries_of_its_head(groups, softcap):
    query, key, _ = qkv(2, groups, 4, 9, b=2)
    start, limits = 2, [5, 2, 9, 7]
    mask = torch.arange(9) < torch.tensor(limits)[:, None]
    mask[:, :start] = False
    # Values that are one for one token each: what comes out are the weights.
    each = torch.eye(9).expand(2, 2, 9, 9)
    weights, lse = reference.attend(query, key, each, scale=0.4, mask=mask, softcap=softcap)
    got = reference.attention_mass(query, lse, key[:, :, start:], start, limits, scale=0.4, softcap=softcap)
    expected = weights.reshape(2, 2, groups, 4, 9).sum(dim=(2, 3))
    torch.testing.assert_close(got, expected[..., start:], atol=1e-5, rtol=1e-5)
    assert bool((lse[:, :, 1] == float("-inf")).all())


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("n", [9, 10])
def test_max_pool_is_a_running_maximum_with_the_published_padding(size, n):
    votes = torch.randn(2, n)
    got = reference.max_pool(votes, size)
    before = (size - 1) // 2 if size > 1 else 0
    outputs = n if size <= 1 else n + 2 * before - size + 1
    for row, i in torch.cartesian_prod(torch.arange(2), torch.arange(outputs)).tolist():
        around = votes[row, max(0, i - before) : i - before + max(size, 1)]
        assert got[row, i] == around.max()
    assert got.shape == votes.shape
    assert torch.equal(got[:, outputs:], votes[:, outputs:])


@settings(max_examples=30, deadline=None)
@given(
    n=st.sampled_from([64, 1000, 8191, 8192, 8193, 20_000]),
    k=st.sampled_from([1, 2, 63]),
    levels=st.sampled_from([3, 50, 10**9]),
    seed=st.integers(0, 99),
)
def test_top_k_picks_what_torch_picks_by_value_and_sorts_it_by_place(n, k, levels, seed):
    votes = torch.randint(levels, (2, n), generator=torch.Generator().manual_seed(seed)).double().float()
    index = reference.top_k(votes, k)
    assert bool((index.diff(dim=-1) > 0).all())
    got, expected = votes.gather(-1, index).sort(-1).values, votes.topk(k).values.sort(-1).values
    assert torch.equal(got, expected)


def test_forbidden_tokens_are_minus_infinity():
    values = torch.zeros(1, 3, 5)
    got = reference.forbid(values, 10, [11, 13, 15])
    assert got.isinf().sum(-1).tolist() == [[4, 2, 0]]
    assert bool(got[0, 1, :3].isfinite().all())
    heads = reference.forbid(torch.zeros(1, 3, 2, 5), 10, [11, 13, 15])
    assert torch.equal(heads[:, :, 0], got)
    assert torch.equal(heads[:, :, 1], got)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("r", [2, 4])
def test_rotation_turns_each_pair_of_channels(interleaved, r):
    x, angle = torch.randn(3, 5, 8), torch.randn(5, r)
    got = reference.rotate(x, angle.cos(), angle.sin(), interleaved=interleaved)
    for i in range(r):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + r)
        rotated = torch.complex(x[..., a], x[..., b]) * torch.polar(torch.ones(5), angle[:, i])
        torch.testing.assert_close(got[..., a], rotated.real, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(got[..., b], rotated.imag, atol=1e-6, rtol=1e-5)
    assert torch.equal(got[..., 2 * r :], x[..., 2 * r :])


@pytest.mark.parametrize("window", [None, 1, 3])
def test_masks_end_in_the_corner(window):
    mask = end_aligned(3, 5, window, CPU)
    for row in range(3):
        seen = [token for token in range(5) if token <= 2 + row and (window is None or token > 2 + row - window)]
        assert mask[row].nonzero()[:, 0].tolist() == seen
    wide = additive(3, 5, window, 2, torch.float32, CPU)
    assert torch.equal(wide[0, 0] == 0, mask.repeat(2, 1))
