import pytest
import torch

from kvote.kernels import cpu, reference
from kvote.measure import Geometry, check

SMALL = Geometry(4, 2, 16, torch.float32)


def test_the_law_by_head_is_the_law():
    key, value = SMALL.tokens(300)
    query = SMALL.query()
    law = reference.attend(query, key, value, scale=SMALL.scale)[0][0, :, 0]
    torch.testing.assert_close(check.attention(query, key, value, SMALL.scale), law)
    exact = reference.soft_votes(reference.scores(query, key))[0, 0]
    torch.testing.assert_close(check.votes(query, key, 0), exact)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
def test_votes_of_a_sketch_are_those_of_the_sketched_keys(bits):
    key, _ = SMALL.tokens(300)
    query = SMALL.query()
    rough = reference.scores(reference.sketched_query(query), reference.sketched(key, bits))
    torch.testing.assert_close(check.votes(query, key, bits), reference.soft_votes(rough)[0, 0])


def test_an_answer_that_is_off_is_said():
    law = torch.randn(4, 16)
    check.close("it", law * 1.001, law)
    for wrong in (law * 1.1, law * float("nan"), torch.zeros_like(law)):
        with pytest.raises(check.WrongAnswerError, match="it is off by"):
            check.close("it", wrong, law)


def test_one_wrong_head_among_many_is_said():
    law = torch.randn(64, 16)
    mine = law.clone()
    mine[5] *= 1.05
    with pytest.raises(check.WrongAnswerError):
        check.close("it", mine, law)


def test_wrong_tokens_are_said():
    votes = torch.arange(1000.0)
    check.found("it", torch.arange(900, 1000), votes)
    with pytest.raises(check.WrongAnswerError, match="finds only 90%"):
        check.found("it", torch.arange(890, 990), votes)


def test_a_top_k_is_the_largest_in_order():
    votes = torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0])
    check.largest("it", torch.tensor([0, 4]), votes)
    for wrong in ([4, 0], [0, 3], [2, 2]):
        with pytest.raises(check.WrongAnswerError, match="largest votes"):
            check.largest("it", torch.tensor(wrong), votes)


def test_an_answer_left_over_from_another_query_does_not_pass():
    key, value = SMALL.tokens(100)
    kept: list[torch.Tensor] = []

    def law(query: torch.Tensor) -> torch.Tensor:
        return check.attention(query, key, value, SMALL.scale)

    def stale(query: torch.Tensor) -> torch.Tensor:
        kept.append(law(query))
        return kept[0]

    check.answers("it", law, SMALL, law)
    with pytest.raises(check.WrongAnswerError):
        check.answers("it", stale, SMALL, law)
