"""Decode attention over keys that lie channel by channel, against the law."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvote.kernels import cpu, reference

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason="the C++ kernels are not compiled")
_ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(params=cpu.instruction_sets() if cpu.why_not() is None else [])
def instruction_set(request):
    before = cpu.instruction_set()
    cpu.use(request.param)
    yield request.param
    cpu.use(before)


@settings(max_examples=40, deadline=None)
@given(
    h=st.integers(1, 4),
    groups=st.integers(1, 16),
    kept=st.integers(1, 256),
    dim=st.sampled_from([16, 48, 64, 128, 256]),
    n=st.integers(1, 700),
    beyond=st.integers(0, 70),
    softcap=st.sampled_from([None, 3.0]),
    dtype=st.sampled_from(list(_ROUNDING)),
    seed=st.integers(0, 1000),
)
def _equals_the_law(h, groups, kept, dim, n, beyond, softcap, dtype, seed):
    torch.manual_seed(seed)
    total = n + beyond
    key, value = torch.randn(h, total, kept).to(dtype), torch.randn(h, total, dim).to(dtype)
    query = torch.randn(h, groups, kept)
    if dtype == torch.bfloat16:
        # The kernel meets bfloat16 keys with bfloat16 queries.
        query = query.bfloat16().float()
    expected = reference.attend(
        query.reshape(1, h * groups, 1, kept), key[None, :, :n], value[None, :, :n], scale=kept**-0.5, softcap=softcap
    )
    # What lies behind the last token must not be used, whatever it is.
    key[:, n:], value[:, n:] = float("nan"), float("nan")
    pages = torch.full((h, -(-total // 64) * 64, kept), float("nan"), dtype=dtype)
    pages[:, :total] = key
    pages = pages.reshape(h, -1, 64, kept).transpose(2, 3).contiguous()
    got = []
    for threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            got.append(cpu.thin_decode(query, pages, value, n, scale=kept**-0.5, softcap=softcap))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*got, strict=True))
    out, lse = got[0]
    torch.testing.assert_close(out, expected[0].reshape(h, groups, dim).float(), atol=_ROUNDING[dtype], rtol=0)
    torch.testing.assert_close(lse, expected[1].reshape(h, groups), atol=1e-4, rtol=1e-4)


def test_it_equals_the_law_on_every_instruction_set(instruction_set):
    assert cpu.instruction_set() == instruction_set
    _equals_the_law()


def test_a_wrong_channel_or_token_shows():
    key, value = torch.randn(1, 64, 9), torch.randn(1, 64, 16)
    query = torch.randn(1, 2, 9)
    pages = key.reshape(1, 1, 64, 9).transpose(2, 3).contiguous()
    right = cpu.thin_decode(query, pages, value, 64, scale=1.0, softcap=None)[0]
    assert not torch.allclose(cpu.thin_decode(query.roll(1, 2), pages, value, 64, scale=1.0, softcap=None)[0], right)
    assert not torch.allclose(cpu.thin_decode(query, pages, value, 63, scale=1.0, softcap=None)[0], right)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stop": 65}, "cannot read 65"),
        ({"stop": 0}, "cannot read 0"),
        ({"query": torch.zeros(1, 17, 9)}, "more than 16 query heads"),
        ({"query": torch.zeros(1, 2, 8)}, "pages of the query's channels"),
        ({"values": torch.zeros(1, 64, 24)}, "multiple of 16"),
        ({"values": torch.zeros(1, 64, 16).double()}, "one known dtype"),
        ({"values": torch.zeros(1, 16, 64).transpose(1, 2)}, "must be contiguous"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(changes, reason):
    arguments = {
        "query": torch.zeros(1, 2, 9),
        "keys": torch.zeros(1, 1, 9, 64),
        "values": torch.zeros(1, 64, 16),
        "stop": 64,
        **changes,
    }
    with pytest.raises(ValueError, match=reason):
        cpu.thin_decode(**arguments, scale=1.0, softcap=None)
