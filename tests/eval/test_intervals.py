"""Intervals and what is gathered from records."""

import pytest

from kvote.eval.intervals import difference, interval
from kvote.eval.table import rows_of


def test_an_interval_holds_the_mean_and_narrows_with_samples():
    few, many = interval([0.0, 1.0] * 5), interval([0.0, 1.0] * 200)
    assert few.low < few.mean == 0.5 < few.high
    assert many.high - many.low < 0.3 * (few.high - few.low)
    # 1.96 standard errors of a fair coin thrown 400 times.
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.025, rel=0.1)


def test_a_difference_is_paired_by_sample():
    one, other = {str(i): i + 0.1 for i in range(20)}, {str(i): float(i) for i in range(15)}
    found = difference(one, other)
    assert found is not None
    assert (found.mean, found.count) == (pytest.approx(0.1), 15)
    assert found.high - found.low < 1e-9
    assert difference(one, {}) is None


def record(name: str, index: int, **more: object) -> dict[str, object]:
    cost = {"nbytes": 1, "tokens_read": 2, "ms_per_token": 3.0}
    return {"task": "facts", "length": 8, "index": index, "name": name, **cost, **more}


def test_rows_compare_with_dense_on_the_same_samples():
    held = [record("dense", i, score=0.5, answer_ids=[[1, 2, 3]]) for i in range(4)]
    held += [record("kivi", i, score=1.0, answer_ids=[[1, 9, 3]]) for i in range(3)]
    held += [record("think", 0, refused="no")]
    dense, kivi, think = rows_of(held)
    assert dense.beside is None
    assert kivi.beside is not None
    assert (kivi.beside.mean, kivi.beside.count, kivi.diverges) == (0.5, 3, 1.0)
    assert (think.value, think.refused) == (None, "no")


def test_tails_are_over_all_tokens():
    held = [record("dense", 0, nll=[1.0], kl=[0.0]), record("kivi", 0, nll=[2.0] * 3, kl=[0.0, 1.0, 5.0])]
    tail = rows_of(held)[1].tail
    assert tail is not None
    assert (tail.median, tail.largest) == (1.0, 5.0)
    assert 4.5 < tail.p99 < 5.0
