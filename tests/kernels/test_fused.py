"""Attention through torch's fused kernel equals the reference on random shapes, and what it cannot do goes there."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvote import kernels
from kvote.kernels import fused, masks, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 2, 63, 64, 65, 100, 1000]
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


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
    assert kernels.chosen(torch.zeros(1, 16)) is kernels.named("reference")
