"""Packed keys and values: the law itself, and the compiled kernels against it."""

from dataclasses import replace
from typing import Any

import packs as p
import pytest
import torch
from comparisons import same_bits
from examples import SETS, instruction_set, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import DTYPES, Case, Paged, compiled

from kvote.kernels import cpu, packing
from kvote.kernels.cpu import packed
from kvote.kernels.lanes import Lanes
from kvote.kernels.packing import PACKED, Packing

given_cases = settings(max_examples=60, deadline=None)


def some_range(data: Any, n: int) -> range:
    start = data.draw(st.integers(0, n - 1) | st.just(0))
    return range(start, data.draw(st.integers(start + 1, n) | st.just(n)))


def one_by_one(x: list[float], bits: int, dtype: torch.dtype) -> tuple[list[int], float, float]:
    """Codes, scale and minimum of one group, number by number, each step rounded to ``dtype``."""

    def rounded(number: float) -> float:
        return float(torch.tensor(number, dtype=torch.float32).to(dtype))

    top, least = 2**bits - 1, min(x)
    scale = rounded(rounded(max(x) - least) / top)
    codes = [round(min(max(rounded(rounded(v - least) / (scale or 1.0)), 0.0), float(top))) for v in x]
    return codes, scale, least


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_law_is_what_it_says(dtype, bits):
    groups = torch.randn(50, 32, generator=torch.Generator().manual_seed(bits)).to(dtype)
    groups[7], groups[8, 3:] = 0.3, -2.0
    codes, scale, least = packing.quantise(groups, bits)
    for i, group in enumerate(groups.tolist()):
        expected, s, m = one_by_one(group, bits, dtype)
        # In float32, Python's own numbers are finer than the law's.
        if dtype != torch.float32:
            assert (codes[i].tolist(), float(scale[i]), float(least[i])) == (expected, s, m)
        assert abs(float(scale[i]) - s) <= 1e-6 * s
        assert float((codes[i].int() - torch.tensor(expected)).abs().max()) <= (dtype == torch.float32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_decode_to_within_half_a_step(dtype, bits):
    x = 3 * torch.randn(4, 256, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    eps = torch.finfo(dtype).eps
    for codes, scale, least in (packing.quantise_keys(x, bits, 32), packing.quantise_values(x, bits, 32)):
        if scale.shape[1] == 256:
            scale, least = scale.repeat_interleave(32, 2), least.repeat_interleave(32, 2)
        else:
            scale, least = scale.repeat_interleave(32, 1), least.repeat_interleave(32, 1)
        off = (packing.dequantise(codes, scale, least).float() - x.float()).abs()
        # The largest number is reached with a rounded scale, and every step of the law rounds.
        assert bool((off <= scale.float() / 2 + 4 * eps * x.float().abs().amax()).all())
        assert float(off.max()) > float(scale.float().max()) / 8


def test_constant_groups_decode_to_their_number():
    x = torch.full((1, 32, 32), 0.3, dtype=torch.bfloat16)
    for quantise in (packing.quantise_keys, packing.quantise_values):
        codes, scale, least = quantise(x, 2, 32)
        assert bool((codes == 0).all())
        assert bool((scale == 0).all())
        assert torch.equal(
            packing.dequantise(codes, scale, least), torch.full_like(codes, 0, dtype=x.dtype) + x[0, 0, 0]
        )


@pytest.mark.parametrize("dim", [8, 24, 64, 80])
@pytest.mark.parametrize("are_keys", [True, False], ids=["keys", "values"])
def test_pages_give_back_what_was_packed(dim, are_keys):
    form = Packing(2, 32, dim, torch.float32, are_keys)
    x = torch.randn(160, dim, generator=torch.Generator().manual_seed(0))
    pool = torch.full((4, form.page_bytes), 255, dtype=torch.uint8)
    slots = torch.cat([torch.arange(3 * PACKED, 4 * PACKED), torch.arange(PACKED, PACKED + 32)])
    packing.pack(x, pool, form, slots)
    quantise = packing.quantise_keys if are_keys else packing.quantise_values
    assert torch.equal(packing.codes_of(pool, form, slots)[0], quantise(x, 2, 32)[0])
    codes, scale, least = quantise(x, 2, 32)
    repeated = [s.repeat_interleave(32, 0 if are_keys else 1)[:, :dim] for s in (scale, least)]
    assert torch.equal(packing.unpack(pool, form, slots), packing.dequantise(codes, *repeated))
    assert bool((pool[[0, 2]] == 255).all())


def test_a_page_is_as_large_as_the_formula_says():
    for bits, group, expected in ((2, 32, 3.0), (2, 64, 2.5), (2, 128, 2.25), (4, 32, 5.0)):
        for are_keys in (True, False):
            form = Packing(bits, group, 128, torch.bfloat16, are_keys)
            assert form.page_bytes * 8 == expected * PACKED * 128


@compiled
@given_cases
@given(p.pack_cases(), st.integers(0, 999), st.sampled_from([0, 16]))
def test_packing_writes_what_the_law_writes(pack, cut, offset):
    p.pack_writes_what_the_law_writes(pack, cut, offset)


@compiled
@given_cases
@given(p.pack_cases(), st.data())
def test_unpacking_gives_what_the_law_gives(pack, data):
    p.unpack_gives_what_the_law_gives(pack, some_range(data, pack.case.n))
    p.unpack_gives_what_the_law_gives(pack, data.draw(st.integers(0, pack.case.n)))


@compiled
@given_cases
@given(p.pack_cases(), st.integers(1, 3), st.data())
def test_scores_equal_the_law(pack, rows, data):
    p.scores_equal_the_law(pack, some_range(data, pack.case.n), rows)


@compiled
@given_cases
@given(p.pack_cases(), st.sampled_from([None, 2.0]), st.data())
def test_attention_equals_the_law(pack, softcap, data):
    p.attend_equals_the_law(pack, some_range(data, pack.case.n), softcap)


@compiled
@given_cases
@given(p.pack_cases(), st.integers(1, 400), st.sampled_from([None, 2.0]), st.data())
def test_recent_tokens_are_read_in_the_same_call(pack, behind, softcap, data):
    p.attend_with_recent_equals_both(pack, some_range(data, pack.case.n), some_range(data, behind), softcap)


@compiled
def test_recent_tokens_alone_are_an_answer():
    p.attend_with_recent_equals_both(p.PackCase(Case(n=50)), range(0), range(3, 70), None)


@compiled
def test_attention_over_no_tokens_answers_nothing():
    held = p.Packs(p.PackCase(Case(n=50)))
    query = torch.randn(1, 4, 32)
    out, lse = packed.attend(query, held.of_keys(), held.of_values(), range(0), scale=1.0, softcap=None)
    assert bool((out == 0).all())
    assert bool((lse == float("-inf")).all())


SHAPES = [
    p.PackCase(Case(n=333, sequences=2, groups=g, d=d, dtype=t, seed=d), bits, group)
    for d, g, bits, group in ((16, 1, 2, 32), (80, 7, 4, 64), (96, 2, 2, 128), (128, 4, 2, 32), (256, 8, 8, 32))
    for t in DTYPES
]


@compiled
@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set_equals_the_law(isa):
    with instruction_set(isa):
        for pack in SHAPES:
            p.pack_writes_what_the_law_writes(pack, 100, 0)
            p.unpack_gives_what_the_law_gives(pack, 77)
            p.scores_equal_the_law(pack, range(5, 331), 2)
            p.attend_equals_the_law(pack, range(130, 333), None)
            p.attend_equals_the_law(pack, range(1), 3.0)
            p.attend_with_recent_equals_both(pack, range(130, 333), range(2, 201), None)


@compiled
@pytest.mark.parametrize("pack", SHAPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(pack):
    pack = replace(pack, case=replace(pack.case, n=2000, sequences=1))
    calls = [
        lambda: p.pack_writes_what_the_law_writes(pack, 100, 0),
        lambda: p.unpack_gives_what_the_law_gives(pack, range(3, 1999)),
        lambda: p.scores_equal_the_law(pack, range(5, 1990), 2),
        lambda: p.attend_equals_the_law(pack, range(1, 1999), None),
        lambda: p.attend_with_recent_equals_both(pack, range(1, 1999), range(300), None),
    ]
    for call in calls:
        alone = call()
        for count in (2, 3):
            with threads(count):
                together = call()
            assert all(same_bits(a, b) for a, b in zip(alone, together, strict=True))


@compiled
@pytest.mark.parametrize("fault", ["codes", "scales", "minima", "pages"])
def test_the_comparison_notices_a_fault(fault, monkeypatch):
    """One bit of a code, a scale, a minimum, or two pages that changed places."""
    pack = p.PackCase(Case(n=300, d=64, pages="run"), kind="plain")
    whole = p.Packs.law

    def faulty(self, form):
        pool = whole(self, form)
        page = int(self.slots([0])[0, 0]) // PACKED
        scales = form.code_bytes
        if fault == "pages":
            pool[[page, page + 1]] = pool[[page + 1, page]]
        else:
            at = {"codes": 0, "scales": scales, "minima": (scales + form.page_bytes) // 2}[fault]
            pool[page, at + 3] ^= 64 if fault == "codes" else 1
        return pool

    of_keys, of_values = p.Packs.of_keys, p.Packs.of_values
    for name, call in (("of_keys", of_keys), ("of_values", of_values)):

        def spoiled(self, call=call):
            _pool, form, table = call(self)
            return faulty(self, form), form, table

        monkeypatch.setattr(p.Packs, name, spoiled)
    for call in (
        lambda: p.scores_equal_the_law(pack, range(300), 1),
        lambda: p.attend_equals_the_law(pack, range(200), None),
    ):
        with pytest.raises(AssertionError):
            call()


def refusals() -> dict[str, Any]:
    held = p.Packs(p.PackCase(Case(n=64)))
    key, value, x = held.of_keys(), held.of_values(), torch.zeros(2, 32, 32)
    query, rule = torch.zeros(1, 4, 32), {"scale": 1.0, "softcap": None}
    wide = replace(key[1], dim=24)
    first = torch.zeros(1, 3, dtype=torch.int64)
    raw = Paged(Case(n=9))

    def beside(keys, values, table=None):
        recent = keys, values, table or raw.table(), range(9)
        return packed.attend(query, key, value, range(9), recent=recent, **rule)

    return {
        "whole groups": lambda: packed.pack(x[:, :5], *key, [0, 0]),
        "as many lanes": lambda: packed.pack(x, *key, [0]),
        "dtype of the form": lambda: packed.pack(x.half(), *key, [0, 0]),
        "head size of the form": lambda: packed.pack(x[..., :16], *key, [0, 0]),
        "multiple of 16": lambda: packed.pack(torch.zeros(2, 32, 24), key[0], wide, key[2], [0, 0]),
        "contiguous pool of the form": lambda: packed.pack(x, key[0][:, :-1], *key[1:], [0, 0]),
        "one list per sequence": lambda: packed.unpack(*key, first.repeat(2, 1), 1, x),
        "contiguous int64": lambda: packed.unpack(*key, first.int(), 1, x),
        "room for the tokens": lambda: packed.unpack(*key, range(40), 1, x),
        "contiguous but": lambda: packed.unpack(*key, range(9), 1, torch.zeros(2, 32, 64)[..., ::2]),
        "by lanes": lambda: packed.unpack(*key, range(9), 1, x.half()),
        "query's head size": lambda: packed.attend(query[..., :16], key, value, range(9), **rule),
        "keys must be keys and": lambda: packed.attend(query, value, key, range(9), **rule),
        "recent tokens must have the head size": lambda: beside(raw.keys[..., :16], raw.values[..., :16]),
        "recent tokens must be of the dtype": lambda: beside(raw.keys.half(), raw.values.half()),
        "in contiguous pools": lambda: beside(raw.keys, raw.values.transpose(0, 1).contiguous().transpose(0, 1)),
        "of as many lanes": lambda: beside(raw.keys, raw.values, Lanes(raw.runs[:1])),
        "keys must be keys of": lambda: packed.scores(query[:, :, None], value, range(9)),
        "as many query heads": lambda: packed.attend(query[:, :3], key, value, range(9), **rule),
        "alike": lambda: packed.attend(query, key, (value[0], replace(value[1], bits=4), value[2]), range(9), **rule),
    }


@pytest.mark.parametrize("reason", refusals() if cpu.why_not() is None else [])
def test_what_would_be_read_wrongly_is_refused(reason):
    with pytest.raises(ValueError, match=reason):
        refusals()[reason]()
