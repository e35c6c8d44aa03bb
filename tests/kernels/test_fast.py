"""Fast kernels equal the reference on random shapes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvote import kernels
from kvote.kernels import cpu, fused, masks, reference
from kvote.store.pages import PAGE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 2, 63, 64, 65, 100, 1000]
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
compiled = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))


@st.composite
def blocks(draw: Any) -> dict[str, Any]:
    m = draw(st.sampled_from(LENGTHS))
    return {
        "m": m,
        "t": draw(st.integers(1, min(m, 20)) | st.just(min(m, 100))),
        "b": draw(st.integers(1, 3)),
        "h": draw(st.integers(1, 3)),
        "g": draw(st.integers(1, 8)),
        "d": draw(st.sampled_from([16, 32, 80, 128])),
        "dtype": draw(st.sampled_from(DTYPES)),
        "seed": draw(st.integers(0, 9)),
    }


def tensors(shape: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(shape["seed"])
    b, h, m, d = (shape[name] for name in "bhmd")
    sizes = (b, h * shape["g"], shape["t"], d), (b, h, m, d), (b, h, m, d)
    return tuple(torch.randn(size, generator=generator).to(shape["dtype"]) for size in sizes)


def agree(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    torch.testing.assert_close(got[0].float(), expected[0].float(), atol=CLOSE[dtype], rtol=CLOSE[dtype])
    torch.testing.assert_close(got[1].float(), expected[1].float(), atol=CLOSE[dtype], rtol=CLOSE[dtype])
    assert got[0].dtype == expected[0].dtype
    assert got[1].dtype == torch.float32


@settings(max_examples=80, deadline=None)
@given(blocks(), st.booleans(), st.sampled_from([None, 1, 7, 64]))
def test_fused_attention_equals_the_reference(shape, causal, window):
    query, key, value = tensors(shape)
    window = window if causal else None
    scale = shape["d"] ** -0.5
    mask = masks.end_aligned(shape["t"], shape["m"], window, query.device) if causal else None
    expected = reference.attend(query, key, value, scale=scale, mask=mask)
    agree(fused.attend(query, key, value, scale=scale, causal=causal, window=window), expected, shape["dtype"])


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("entries", [1, 50, 500])
def test_rows_cut_into_blocks_give_the_same(monkeypatch, window, entries):
    query, key, value = tensors({"b": 2, "h": 2, "g": 3, "t": 13, "m": 40, "d": 16, "dtype": torch.float32, "seed": 0})
    expected = fused.attend(query, key, value, scale=0.25, causal=True, window=window)
    monkeypatch.setattr(fused, "_MASK_ENTRIES", entries)
    agree(fused.attend(query, key, value, scale=0.25, causal=True, window=window), expected, torch.float32)


def test_keys_that_lie_strided_are_read_right():
    pool = torch.randn(1000, 16)
    key = pool.as_strided((2, 3, 50, 16), (3 * 1600, 1600, 16, 1), 160)
    query = torch.randn(2, 6, 4, 16)
    got = fused.attend(query, key, key, scale=0.25, causal=True, window=None)
    agree(got, fused.attend(query, key.clone(), key.clone(), scale=0.25, causal=True, window=None), torch.float32)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dv", [16, 8])
def test_what_fused_cannot_do_goes_to_the_reference(softcap, dv):
    query, key, value = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, dv)
    mask = masks.end_aligned(3, 9, None, query.device)
    expected = reference.attend(query, key, value, scale=0.2, mask=mask, softcap=softcap)
    agree(kernels.attend(query, key, value, scale=0.2, softcap=softcap), expected, torch.float32)
    assert (fused.why_not(query, key, value, softcap) is None) == (softcap is None and dv == 16)


def test_no_tokens_to_read_is_an_empty_answer():
    query, nothing = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 0, 16)
    out, lse = kernels.attend(query, nothing, nothing, scale=1.0, causal=False)
    assert bool((out == 0).all())
    assert bool((lse == float("-inf")).all())


def test_the_backend_can_be_forced(monkeypatch):
    monkeypatch.setenv("KVOTE_BACKEND", "reference")
    assert kernels.backend() == "reference"
    assert not kernels.compiled(torch.zeros(1, 16))


@compiled
@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([1, 2, 63, 64, 65, 1000, 9001]),
    rows=st.integers(1, 4),
    levels=st.sampled_from([1, 3, 1000, 10**9]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_compiled_top_k_equals_the_reference_by_value(n, rows, levels, seed, data):
    k = data.draw(st.integers(1, n))
    votes = torch.randint(levels, (rows, n), generator=torch.Generator().manual_seed(seed)).float() - levels // 2
    index = cpu.top_k(votes, k)
    assert bool((index.diff(dim=-1) > 0).all())
    assert torch.equal(votes.gather(-1, index).sort(-1).values, votes.topk(k).values.sort(-1).values)
    # Ties go to the lower index.
    assert torch.equal(index, votes.sort(dim=-1, descending=True, stable=True).indices[:, :k].sort(-1).values)


@compiled
def test_compiled_top_k_prefers_anything_to_what_is_forbidden():
    votes = torch.full((1, 100), float("-inf"))
    votes[0, [3, 50, 99]] = torch.tensor([-1e30, 1e-30, 0.0])
    assert cpu.top_k(votes, 3).tolist() == [[3, 50, 99]]


class Paged:
    """Lanes scattered over a pool of pages, and the same tokens as plain tensors."""

    def __init__(self, heads: int, n: int, d: int, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        pages = -(-n // PAGE)
        order = torch.randperm(heads * pages, generator=generator)
        self.keys = torch.randn(heads * pages, PAGE, d, generator=generator).to(dtype)
        self.values = torch.randn(heads * pages, PAGE, d, generator=generator).to(dtype)
        table = order.reshape(heads, pages)
        self.lanes = cpu.Lanes([[(page, 1) for page in lane] for lane in table.tolist()])
        self.key, self.value = (x[table].reshape(1, heads, -1, d)[:, :, :n] for x in (self.keys, self.values))


@compiled
@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([5, 63, 64, 100, 300]),
    heads=st.integers(1, 3),
    groups=st.integers(1, 8),
    d=st.sampled_from([16, 32, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_compiled_votes_equal_the_reference(n, heads, groups, d, dtype, data):
    pool = Paged(heads, n, d, dtype, data.draw(st.integers(0, 9)))
    start = data.draw(st.integers(0, n - 1))
    limits = sorted(data.draw(st.lists(st.integers(start + 1, n), min_size=1, max_size=4)))
    query = torch.randn(1, heads * groups, len(limits), d) / d**0.5
    got = cpu.votes(query[0], pool.keys, pool.lanes, None, 0, start, limits)
    # The law rounds queries to the dtype of the keys; compiled kernels may keep them in float32.
    logits = reference.scores(query, pool.key[:, :, start : limits[-1]].float())
    expected = reference.soft_votes(reference.forbid(logits, start, limits))[0]
    torch.testing.assert_close(got, expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-3, rtol=2e-2)
    torch.testing.assert_close(got.sum(-1), torch.full((len(limits),), float(heads * groups)), atol=1e-2, rtol=1e-3)


@compiled
@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([1, 63, 64, 100, 300]),
    heads=st.integers(1, 3),
    d=st.sampled_from([16, 32, 128]),
    dtype=st.sampled_from(DTYPES),
    interleaved=st.booleans(),
    data=st.data(),
)
def test_compiled_gather_fetches_and_rotates(n, heads, d, dtype, interleaved, data):
    pool = Paged(heads, n, d, dtype, data.draw(st.integers(0, 9)))
    index = torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))))
    r = data.draw(st.sampled_from([d // 2, d // 4]))
    angle = torch.randn(len(index), r)
    out = tuple(torch.full((heads, len(index), d), float("nan"), dtype=dtype) for _ in range(2))
    angles = (angle.cos(), angle.sin())
    cpu.gather(pool.keys, pool.values, pool.lanes, index, angles, interleaved, out)
    expected = reference.rotate(pool.key[0][:, index], *angles, interleaved=interleaved)
    torch.testing.assert_close(out[0].float(), expected.float(), atol=CLOSE[dtype], rtol=CLOSE[dtype])
    assert torch.equal(out[1], pool.value[0][:, index])


@compiled
@settings(max_examples=60, deadline=None)
@given(
    n=st.sampled_from([1, 63, 64, 100, 1000]),
    heads=st.integers(1, 3),
    groups=st.integers(1, 8),
    d=st.sampled_from([16, 32, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    softcap=st.sampled_from([None, 2.0]),
    rotated=st.booleans(),
    data=st.data(),
)
def test_compiled_decode_equals_the_reference(n, heads, groups, d, dtype, softcap, rotated, data):
    pool = Paged(heads, n, d, dtype, data.draw(st.integers(0, 9)))
    tokens = data.draw(st.sampled_from([range(n), range(n // 2, n), torch.arange(0, n, 3)]))
    lists = tokens if isinstance(tokens, range) else tokens[None]
    angle = torch.randn(len(tokens), d // 2)
    angles = (angle.cos(), angle.sin()) if rotated else None
    query, scale = torch.randn(heads * groups, d), d**-0.5
    kwargs = {"angles": angles, "interleaved": False, "scale": scale, "softcap": softcap}
    got = cpu.decode(query[None], pool.keys, pool.values, pool.lanes, lists, **kwargs)
    key, value = (x[:, :, list(tokens)].float() for x in (pool.key, pool.value))
    key = reference.rotate(key, *angles) if angles else key
    out, lse = reference.attend(query[None, :, None], key, value, scale=scale, softcap=softcap)
    torch.testing.assert_close(got[0][0], out[0, :, 0], atol=CLOSE[dtype], rtol=CLOSE[dtype])
    torch.testing.assert_close(got[1][0], lse[0, :, 0], atol=CLOSE[dtype], rtol=CLOSE[dtype])


@compiled
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sketch_votes_nearly_like_its_keys(dtype, bits):
    pool = Paged(2, 300, 64, dtype, 0)
    sketch = torch.zeros(len(pool.keys), PAGE // cpu.SKETCH_TOKENS * cpu.sketch_bytes(64, bits), dtype=torch.uint8)
    cpu.sketch(pool.keys, sketch, bits, torch.arange(pool.keys.shape[0] * PAGE))
    query = torch.randn(8, 1, 64)
    exact = cpu.votes(query, pool.keys, pool.lanes, None, 0, 3, [290])
    rough = cpu.votes(query, pool.keys, pool.lanes, sketch, bits, 3, [290])
    assert not torch.equal(exact, rough)
    assert (exact - rough).abs().sum() < (0.1 if bits == 8 else 0.8) * exact.sum()
