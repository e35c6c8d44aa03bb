"""The compiled kernels answer alike with every instruction set of this machine and with any number of threads."""

from dataclasses import replace

import pytest
import torch
from comparisons import same_bits
from examples import LARGE, NAMES, SHAPES, SMALL, examples, instruction_set, some_votes, threads
from paged import DTYPES, compiled

from kvote.kernels import cpu

pytestmark = compiled
SETS = cpu.instruction_sets() if cpu.why_not() is None else []
# What only counts or copies is the same to the bit; sums may be taken in another order.
EXACT = ["top_k", "append", "append and sketch", "sketch of 8 bits", "sketch of 4 bits"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set_equals_the_reference(isa, name):
    with instruction_set(isa):
        for case in SHAPES:
            examples(case)[name]()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_every_instruction_set_writes_the_same_sketches_and_orders(case, name):
    answers = []
    for isa in SETS:
        with instruction_set(isa):
            answers.append(examples(case)[name]())
    for answer in answers[1:]:
        assert all(same_bits(a, b) for a, b in zip(answers[0], answer, strict=True))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sketched_votes_agree_across_instruction_sets(dtype, bits):
    for case in (case for case in SHAPES if case.dtype == dtype):
        answers = []
        for isa in SETS:
            with instruction_set(isa):
                answers.append(examples(case)[f"votes of {bits} bits"]())
        for answer in answers[1:]:
            # Scores are whole numbers times a scale; a weight may be rounded to either neighbour of its 10 bits.
            torch.testing.assert_close(answer, answers[0], rtol=2**-9, atol=1e-36)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype, name):
    case = replace(LARGE, dtype=dtype)
    alone = examples(case)[name]()
    for count in (2, 3):
        with threads(count):
            together = examples(case)[name]()
        assert all(same_bits(a, b) for a, b in zip(alone, together, strict=True))


def test_threads_share_the_rows_of_a_long_vote():
    votes = some_votes(5, 20_000)
    alone = cpu.top_k(votes, 700)
    with threads(3):
        assert torch.equal(cpu.top_k(votes, 700), alone)


def test_other_sets_and_threads_are_put_back():
    assert cpu.instruction_set() == SETS[-1]
    with instruction_set("scalar"), threads(2):
        assert (cpu.instruction_set(), torch.get_num_threads()) == ("scalar", 2)
        examples(SMALL)["top_k"]()
    assert (cpu.instruction_set(), torch.get_num_threads()) == (SETS[-1], 1)
