"""Packed tokens read by the GPU kernels: in Triton's interpreter at small sizes, on a GPU where there is one."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from on_gpu import (
    DEVICE,
    PacksThere,
    There,
    kernels,
    pack_writes_what_the_law_writes,
    packed_attend_equals_the_law,
    packed_scores_equal_the_law,
    runs,
    unpack_gives_what_the_law_gives,
)
from packs import PackCase
from paged import Case

from kvote.kernels import packing
from kvote.kernels.lanes import Lanes
from kvote.kernels.packing import PACKED, Packing

pytestmark = runs
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("pack", "tokens", "options"),
    [
        (PackCase(Case(n=300, sequences=2, groups=7, d=80, dtype=BF16)), range(5, 299), {}),
        (PackCase(Case(n=333, sequences=2, groups=4, d=64), 4, 64), range(333), {}),
        (PackCase(Case(n=1, groups=8, d=128, dtype=F16), 4, 128), range(1), {}),
        (PackCase(Case(n=700, heads=1, groups=1, d=256, dtype=BF16, pages="run")), range(130, 700), {"softcap": 5.0}),
        (PackCase(Case(n=259, heads=1, groups=17, d=16, pages="mixed"), 4), range(127, 258), {}),
        (PackCase(Case(n=200, groups=2, d=96, dtype=F16), 2, 64, "outliers"), range(64, 200), {"softcap": 20.0}),
        (PackCase(Case(n=300, groups=2, d=128, dtype=BF16), 2, 128), range(300), {}),
        (PackCase(Case(n=140, d=64, dtype=F16), 2, 32, "constant"), range(140), {}),
        (PackCase(Case(n=140, d=256, dtype=F16), 4, 128, "tiny"), range(3, 140), {}),
        (PackCase(Case(n=150, sequences=2, groups=3, d=80, dtype=BF16), 8, 32, by_token=True), range(1, 150), {}),
        (PackCase(Case(n=150, groups=2, d=64), 2, 128, "outliers", by_token=True), range(150), {}),
    ],
    ids=str,
)
def test_attention_equals_the_reference_over_what_is_decoded(pack, tokens, options):
    packed_attend_equals_the_law(pack, tokens, **options)


@pytest.mark.parametrize("stops", [[17, 300], [0, 200], [90, 129], [0, 0]])
def test_sequences_read_as_far_as_the_device_says(stops):
    pack = PackCase(Case(n=300, sequences=2, groups=3, d=64, dtype=F16))
    packed_attend_equals_the_law(pack, range(300), stops=stops)
    packed_attend_equals_the_law(pack, range(90, 299), stops=stops)


@pytest.mark.parametrize(
    ("tokens", "recent"), [(range(140), range(3, 70)), (range(130, 299), range(200)), (range(0), range(9))]
)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_recent_tokens_are_read_beside_them(tokens, recent, dtype):
    pack = PackCase(Case(n=300, sequences=2, groups=3, d=80, dtype=dtype), 4)
    packed_attend_equals_the_law(pack, tokens, recent=recent)
    packed_attend_equals_the_law(pack, tokens, recent=recent, softcap=4.0)


def test_lanes_may_own_unlike_many_pages():
    """Of a longer lane, the kernel reads as much as of the others, whatever the table ends in."""
    pack = PackCase(Case(n=300, sequences=2, d=32, pages="run"))
    held = PacksThere(pack)
    runs_of = held.layout.runs
    longer = [[*lane, (lane[0][0], 3)] if i == 1 else lane for i, lane in enumerate(runs_of)]
    query, rule = torch.randn(2, 4, 32).to(DEVICE), {"scale": 0.2, "softcap": None}
    answers = []
    for lanes in (Lanes(runs_of), Lanes(longer)):
        keys, values = ((pool, form, lanes) for pool, form, _ in held.there())
        answers.append(kernels().packed.attend(query, keys, values, range(7, 300), **rule))
    for mine, other in zip(*answers, strict=True):
        assert torch.equal(mine, other)


def test_no_tokens_answer_nothing():
    keys, values = PacksThere(PackCase(Case(n=50))).there()
    out, lse = kernels().packed.attend(
        torch.randn(1, 4, 32).to(DEVICE), keys, values, range(0), scale=1.0, softcap=None
    )
    assert bool((out == 0).all())
    assert bool((lse == float("-inf")).all())


@pytest.mark.parametrize(
    ("pack", "tokens", "rows"),
    [
        (PackCase(Case(n=300, sequences=2, groups=7, d=80, dtype=BF16)), range(5, 299), 2),
        (PackCase(Case(n=333, heads=1, groups=4, d=64), 4, 64), range(333), 1),
        (PackCase(Case(n=150, groups=2, d=256, dtype=F16), 4, 128, "outliers"), range(130, 150), 3),
        (PackCase(Case(n=150, heads=1, groups=40, d=96, dtype=F16)), range(31, 97), 2),
        (PackCase(Case(n=70, d=16, dtype=BF16), 8, 32, by_token=True), range(70), 1),
    ],
    ids=str,
)
def test_scores_equal_the_reference_over_what_is_decoded(pack, tokens, rows):
    packed_scores_equal_the_law(pack, tokens, rows)


def test_scores_of_no_tokens_are_empty():
    keys, _ = PacksThere(PackCase(Case(n=50))).there()
    assert kernels().packed.scores(torch.randn(1, 4, 1, 32).to(DEVICE), keys, range(20, 20)).shape == (1, 4, 1, 0)


FORMS = [(2, 32, 80, "plain", dtype) for dtype in (F32, BF16, F16)]
FORMS += [(4, 64, 64, "outliers", dtype) for dtype in (F32, BF16, F16)]
FORMS += [
    (2, 128, 256, "constant", BF16),
    (8, 32, 16, "huge", F16),
    (4, 128, 96, "tiny", F16),
    (8, 64, 48, "tiny", F32),
]


def packing_case(form: tuple[int, int, int, str, torch.dtype], by_token: bool) -> PackCase:
    """Two lanes of 256 tokens."""
    bits, group, d, kind, dtype = form
    return PackCase(Case(n=256, sequences=2, heads=1, d=d, dtype=dtype, pages="mixed"), bits, group, kind, by_token)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_pages_are_those_of_the_law_bit_for_bit(form, by_token):
    """Whole pages, one token, some behind others in the same words, lanes that begin in different places."""
    pack = packing_case(form, by_token)
    pack_writes_what_the_law_writes(pack, [0, 0], 256)
    pack_writes_what_the_law_writes(pack, [117, 117], 1)
    pack_writes_what_the_law_writes(pack, [9, 9], 130, offset=16)
    pack_writes_what_the_law_writes(pack, [127, 5], 129)
    pack_writes_what_the_law_writes(pack, [128, 256], 0)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf"), -0.0])
@pytest.mark.parametrize("form", FORMS[3:6], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_odd_numbers_are_packed_as_by_the_law(number, form):
    for by_token in (False, True):
        pack_writes_what_the_law_writes(packing_case(form, by_token), [0, 0], 64, spoil=number)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_numbers_midway_between_two_codes_go_to_the_even_one(dtype):
    """Multiples of a quarter, with a scale of one half: every other one lies midway."""
    x = (torch.arange(32) % 7).to(dtype) / 4
    assert torch.equal(packing.quantise(x, 2)[0][:7], torch.tensor([0, 0, 1, 2, 2, 2, 3], dtype=torch.uint8))
    for are_keys in (True, False):
        form = Packing(2, 32, 32, dtype, are_keys)
        law = torch.zeros(1, form.page_bytes, dtype=torch.uint8)
        mine, tokens = law.to(DEVICE), x.repeat(32, 1)
        tokens = tokens.T.contiguous() if are_keys else tokens
        packing.pack(tokens, law, form, torch.arange(32))
        kernels().packed.pack(tokens[None].to(DEVICE), mine, form, Lanes([[(0, 1)]]), [0])
        assert torch.equal(mine.cpu(), law)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_tokens_decode_as_by_the_law_bit_for_bit(form, by_token):
    pack = packing_case(form, by_token)
    for tokens in (range(256), range(3, 140), range(255, 256), range(7, 7), 33, 0):
        unpack_gives_what_the_law_gives(pack, tokens)


@pytest.mark.parametrize("fault", ["first", "table", "numbers"])
def test_the_comparison_of_pages_notices_a_fault(fault, monkeypatch):
    """Tokens one place further, lanes that changed places, numbers a little larger."""
    pack, ours = packing_case(FORMS[0], by_token=True), kernels().packed.pack

    def faulty(x, pages, form, lanes, first):
        if fault == "first":
            first = [at + 1 for at in first]
        if fault == "table":
            lanes = Lanes([[tuple(run) for run in lane] for lane in there.layout.runs][::-1])
        if fault == "numbers":
            x = x * 1.001
        ours(x, pages, form, lanes, first)

    there = PacksThere(pack)
    monkeypatch.setattr(kernels().packed, "pack", faulty)
    with pytest.raises(AssertionError):
        pack_writes_what_the_law_writes(pack, [5, 5], 60)


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("fault", ["codes", "scales", "minima", "pages"])
def test_the_comparison_notices_a_fault(fault, by_token, monkeypatch):
    """One bit of a code, a scale, a minimum, or two pages that changed places."""
    pack = PackCase(Case(n=300, d=64, pages="run"), by_token=by_token)
    there = PacksThere.there

    def faulty(pool, form, page):
        pool = pool.clone()
        if fault == "pages":
            pool[[page, page + 1]] = pool[[page + 1, page]]
        else:
            first = form.code_bytes
            at = {"codes": 0, "scales": first, "minima": (first + form.page_bytes) // 2}[fault]
            pool[page, at + 3] ^= 64 if fault == "codes" else 1
        return pool

    def spoiled(self):
        page = int(self.slots([0])[0, 0]) // PACKED
        keys, values = ((faulty(pool, form, page), form, lanes) for pool, form, lanes in there(self))
        return keys, values

    monkeypatch.setattr(PacksThere, "there", spoiled)
    with pytest.raises(AssertionError):
        packed_attend_equals_the_law(pack, range(200))
    with pytest.raises(AssertionError):
        packed_scores_equal_the_law(pack, range(300), 1)


def refusals() -> dict[str, Any]:
    (key, value), raw = PacksThere(PackCase(Case(n=64))).there(), There(Case(n=9))
    query, rule, attend = torch.zeros(1, 4, 32, device=DEVICE), {"scale": 1.0, "softcap": None}, kernels().packed.attend

    def beside(keys, values, table=None):
        return attend(query, key, value, range(9), recent=(keys, values, table or raw.table(), range(9)), **rule)

    many = torch.zeros(1, 130, 32, device=DEVICE)
    return {
        "contiguous pool of the form": lambda: attend(query, (key[0][:, :-1], *key[1:]), value, range(9), **rule),
        "multiple of 16": lambda: attend(
            query[..., :24], (key[0], replace(key[1], dim=24), key[2]), (value[0], replace(value[1], dim=24), value[2]),
            range(9), **rule,
        ),
        "query's head size": lambda: attend(query[..., :16], key, value, range(9), **rule),
        "keys must be keys and": lambda: attend(query, value, key, range(9), **rule),
        "recent tokens must have the head size": lambda: beside(raw.keys[..., :16], raw.values[..., :16]),
        "recent tokens must be of the dtype": lambda: beside(raw.keys.half(), raw.values.half()),
        "in contiguous pools": lambda: beside(raw.keys, raw.values.transpose(0, 1).contiguous().transpose(0, 1)),
        "of as many lanes": lambda: beside(raw.keys, raw.values, Lanes(raw.runs[:1])),
        "keys must be keys of": lambda: kernels().packed.scores(query[:, :, None], value, range(9)),
        "as many query heads": lambda: attend(query[:, :3], key, value, range(9), **rule),
        "share a key head": lambda: attend(many, key, value, range(9), **rule),
        "alike": lambda: attend(query, key, (value[0], replace(value[1], bits=4), value[2]), range(9), **rule),
        "must be consecutive": lambda: attend(query, key, value, range(0, 9, 2), **rule),
        **packing_refusals(key, value),
    }  # fmt: skip


def packing_refusals(key: tuple[Any, ...], value: tuple[Any, ...]) -> dict[str, Any]:
    x, out = torch.zeros(2, 32, 32, device=DEVICE), torch.zeros(2, 32, 32, device=DEVICE)
    pack, unpack = kernels().packed.pack, kernels().packed.unpack
    listed = torch.zeros(1, 32, dtype=torch.int64, device=DEVICE)
    return {
        "as many lanes as tokens": lambda: pack(x[:1], *value, [0]),
        "contiguous and of the dtype": lambda: pack(x.half(), *value, [0, 0]),
        "tokens must have the head size": lambda: pack(x[..., :16], *value, [0, 0]),
        "in whole groups": lambda: pack(x[:, :31], *key, [0, 0]),
        "contiguous int64": lambda: unpack(*key, listed.int(), 1, out),
        "one list per sequence": lambda: unpack(*key, listed, 2, out),
        "by lanes": lambda: unpack(*key, listed, 1, out[:1]),
        "room for the tokens": lambda: unpack(*key, range(33), 1, out),
        "but for its lanes": lambda: unpack(*key, range(9), 1, out.transpose(1, 2)),
    }


def test_what_would_be_read_wrongly_is_refused():
    for reason, call in refusals().items():
        with pytest.raises(ValueError, match=reason):
            call()
