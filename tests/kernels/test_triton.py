"""The GPU kernels equal the reference: in Triton's interpreter at small sizes, on a GPU where there is one."""

import pytest
import torch
from on_gpu import (
    DEVICE,
    There,
    append_stores_and_sketches,
    attend_equals_the_law,
    decode_equals_the_law,
    gather_fetches_and_turns,
    kernels,
    label_scores_equal_the_law,
    mass_equals_the_law,
    runs,
    sketch_is_that_of_the_law,
    votes_equal_the_law,
)
from paged import Case

from kvote.kernels.lanes import Lanes

pytestmark = runs
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("case", "tokens", "options"),
    [
        (Case(n=300, sequences=2, groups=7, d=80, dtype=BF16), range(5, 300), {}),
        (Case(n=300, sequences=2, groups=4, d=64), range(300), {"stops": [17, 300]}),
        (Case(n=300, sequences=2, groups=4, d=64), range(300), {"ends": [17, 300, 0, 128]}),
        (Case(n=1, groups=8, d=128, dtype=F16), range(1), {}),
        (Case(n=700, heads=1, groups=1, d=256, dtype=BF16, pages="run"), range(700), {"softcap": 5.0}),
        (Case(n=129, heads=1, groups=17, d=16, pages="mixed"), range(64, 129), {}),
        (Case(n=200, sequences=2, groups=3, d=128, dtype=BF16), 70, {"pairs": 64}),
        (Case(n=200, heads=1, groups=2, d=80), 33, {"pairs": 10, "interleaved": True}),
        (Case(n=90, groups=2, d=96, dtype=F16), 90, {"softcap": 20.0}),
        (Case(n=90, heads=1, d=256, dtype=BF16), 40, {"pairs": 128}),
    ],
)
def test_decoding_from_pages_equals_the_reference(case, tokens, options):
    decode_equals_the_law(case, tokens, **options)


def test_a_sequence_without_tokens_answers_nothing():
    decode_equals_the_law(Case(n=100, sequences=2, d=64), range(100), stops=[0, 100])


@pytest.mark.parametrize(
    ("case", "start", "limits", "k", "bits"),
    [
        (Case(n=300, sequences=2, groups=7, d=80, dtype=BF16), 7, [297], 20, 0),
        (Case(n=520, heads=1, groups=1, d=64), 0, [520, 300, 1 + 20], 20, 0),
        (Case(n=200, groups=8, d=256, dtype=F16), 63, [190], 1, 0),
        (Case(n=150, heads=1, groups=4, d=16, dtype=BF16, pages="run"), 3, list(range(120, 140)), 9, 0),
        (Case(n=300, sequences=2, groups=7, d=128, dtype=BF16), 7, [297], 20, 8),
        (Case(n=300, heads=1, groups=2, d=80, dtype=F16), 64, [250, 299], 10, 8),
        (Case(n=300, groups=4, d=96), 0, [300], 30, 4),
        (Case(n=200, sequences=2, groups=3, d=80, dtype=BF16), 70, [199, 190], 5, 4),
    ],
)
def test_votes_and_winners_equal_the_reference(case, start, limits, k, bits):
    votes_equal_the_law(case, start, limits, k, bits)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("d", [80, 128])
def test_a_sketch_is_that_of_the_reference(d, bits):
    sketch_is_that_of_the_law(Case(n=100, sequences=2, d=d, dtype=BF16, size=30.0), bits)


def test_a_key_of_nothing_has_a_sketch_of_nothing():
    keys, lanes = torch.zeros(1, 64, 32, device=DEVICE), Lanes([[(0, 1)]])
    for bits in (4, 8):
        sketch = torch.full((1, kernels().sketch_bytes(32, bits)), 255, dtype=torch.uint8, device=DEVICE)
        kernels().sketch(keys, sketch, bits, lanes, 0, 64)
        assert bool((sketch[:, -128:] == 0).all())


def test_flags_skip_the_reading_of_keys_and_leave_the_others_alone():
    pool = There(Case(n=300, sequences=2, d=64))
    query = pool.randn(2, 4, 1, 64).to(DEVICE)
    given = query, pool.keys, pool.table(), None, 0, 5, [290], 12
    whole = kernels().select(*given)
    skip = torch.tensor([True, False], device=DEVICE)
    some = kernels().select(*given, skip=skip)
    assert torch.equal(some[1], whole[1])
    # What was skipped voted for nothing, so its places are no selection.
    assert not torch.equal(some[0], whole[0])


@pytest.mark.parametrize(
    ("case", "t", "options"),
    [
        (Case(n=200, sequences=2, groups=3, d=64, dtype=BF16), 100, {}),
        (Case(n=130, heads=1, groups=7, d=128, dtype=F16), 130, {}),
        (Case(n=97, groups=2, d=80), 1, {"causal": False}),
        (Case(n=150, heads=1, groups=1, d=96), 70, {"window": 20}),
        (Case(n=100, heads=1, d=256, dtype=BF16), 33, {"softcap": 10.0}),
        (Case(n=40, d=64), 60, {}),
    ],
)
def test_attention_of_chunks_equals_the_reference(case, t, options):
    attend_equals_the_law(case, t, **options)


@pytest.mark.parametrize(
    ("case", "start", "limits", "softcap"),
    [
        (Case(n=300, sequences=2, groups=7, d=80, dtype=BF16), 5, [300], None),
        (Case(n=200, groups=3, d=64), 0, list(range(170, 200)), 8.0),
        (Case(n=100, heads=1, groups=1, d=256, dtype=F16), 64, [100, 70], None),
    ],
)
def test_attention_received_equals_the_reference(case, start, limits, softcap):
    mass_equals_the_law(case, start, limits, softcap)


@pytest.mark.parametrize(
    ("case", "start", "stop", "rows", "labels"),
    [
        (Case(n=300, sequences=2, groups=7, d=80, dtype=BF16), 5, 299, 1, 5),
        (Case(n=200, groups=2, d=64, pages="mixed"), 0, 200, 2, 16),
        (Case(n=100, heads=1, groups=40, d=256, dtype=F16), 64, 65, 2, 19),
    ],
)
def test_scores_of_labels_equal_the_reference(case, start, stop, rows, labels):
    label_scores_equal_the_law(case, start, stop, rows, labels)


@pytest.mark.parametrize(
    ("case", "count", "pairs", "interleaved", "lists"),
    [
        (Case(n=200, sequences=2, d=80, dtype=BF16), 50, 40, False, 1),
        (Case(n=200, d=128, dtype=F16), 17, 16, True, 3),
        (Case(n=70, heads=1, d=64), 70, 32, True, 1),
    ],
)
def test_gathering_and_turning_equal_the_reference(case, count, pairs, interleaved, lists):
    gather_fetches_and_turns(case, count, pairs, interleaved, lists)


@pytest.mark.parametrize(
    ("case", "count", "first", "bits", "value_dim"),
    [
        (Case(n=200, sequences=2, d=80, dtype=BF16), 30, [100] * 4, 8, 80),
        (Case(n=200, sequences=2, d=64), 1, [0, 63, 64, 199], 4, 32),
        (Case(n=200, d=128, dtype=F16), 70, [60, 1], 0, 128),
    ],
)
def test_tokens_are_stored_and_sketched(case, count, first, bits, value_dim):
    append_stores_and_sketches(case, count, first, bits, value_dim)


def test_what_the_kernels_cannot_read_is_refused():
    pool = There(Case(n=100, d=64))
    query = pool.query().to(DEVICE)
    options = {"angles": None, "interleaved": False, "scale": 1.0, "softcap": None}
    with pytest.raises(ValueError, match="same head size"):
        kernels().decode(query, pool.keys, pool.values[..., :32], pool.table(), range(9), **options)
    with pytest.raises(ValueError, match="of the query's channels"):
        kernels().label_scores(query[:, :, None, :5], pool.keys.transpose(1, 2).contiguous(), pool.table(), 0, 9)
    with pytest.raises(ValueError, match="cannot take"):
        kernels().select(query[0, :, None], pool.keys, pool.table(), None, 0, 5, [9], 5)
    with pytest.raises(ValueError, match="contiguous int64"):
        kernels().decode(query, pool.keys, pool.values, pool.table(), torch.arange(9)[None].int(), **options)


def test_a_page_table_is_not_made_in_a_captured_graph(monkeypatch):
    from kvote.kernels.triton.common import uploaded

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="cannot be captured"):
        uploaded(torch.zeros(2), torch.device("cuda"))
