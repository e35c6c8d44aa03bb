import pytest
import torch

from kvote import methods
from kvote.calibration.example import example
from kvote.calibration.fingerprint import Fingerprint
from kvote.kernels import cpu, reference
from kvote.kernels.lanes import PAGE
from kvote.measure import Geometry, check
from kvote.spec import parse

SMALL = Geometry(4, 2, 16, torch.float32)
SHAPE = Fingerprint("made-up", 2, 4, 2, 16, (0.0,))


def test_the_law_by_head_is_the_law():
    key, value = SMALL.tokens(300)
    query = SMALL.query()
    law = reference.attend(query, key, value, scale=SMALL.scale)[0][0, :, 0]
    torch.testing.assert_close(check.attention(query, key, value, SMALL.scale), law)
    exact = reference.soft_votes(reference.scores(query, key))[0, 0]
    torch.testing.assert_close(check.votes(query, key, 0, range(300)), exact)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
def test_votes_of_a_sketch_are_those_of_the_sketched_keys(bits):
    key, _ = SMALL.tokens(300)
    query = SMALL.query()
    centred = key - reference.centre(key, PAGE)
    rough = reference.scores(reference.sketched_query(query), reference.sketched(centred[:, :, 5:299], bits))
    torch.testing.assert_close(check.votes(query, key, bits, range(5, 299)), reference.soft_votes(rough)[0, 0])


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


_LAWFUL = [
    "dense",
    "streamingllm(sinks=3, window=40)",
    "h2o(budget=0.25)",
    "snapkv(budget=0.5)",
    "tokenselect(top_k=30, sinks=4, window=20)",
    "tokenselect(top_k=30, sinks=4, window=20, positions='original')",
    "tidaldecode(top_k=20, first=0, reselect=0)",
    "kivi(bits=2, residual=64)",
    "razorattention",
]


def _layers(spec):
    method = methods.razorattention(heads=example("razor", SHAPE), induction=0.5, echo=0.0, budget=50)
    return SMALL.prefilled(method if spec == "razorattention" else parse(spec), *SMALL.tokens(300), layers=2)


@pytest.mark.parametrize("spec", _LAWFUL)
def test_a_decode_step_is_what_the_law_says(spec):
    for layer in _layers(spec):
        methods_before = [part.method for part in layer.parts]
        check.decoding(spec, layer, SMALL)
        assert layer.seen == 301
        assert [part.method for part in layer.parts] == methods_before


@pytest.mark.parametrize("spec", _LAWFUL)
def test_a_decode_step_that_is_off_is_found(spec, monkeypatch):
    layers = _layers(spec)
    for segment in {type(part.segment) for layer in layers for part in layer.parts}:
        attend = segment.attend

        def wrong(self, *args, attend=attend):
            out, lse = attend(self, *args)
            return out * 1.05, lse

        monkeypatch.setattr(segment, "attend", wrong)
    with pytest.raises(check.WrongAnswerError, match="is off by"):
        check.decoding("a method", layers[0], SMALL)
