import pytest
import torch

from kvote import methods
from kvote.calibration.example import example
from kvote.calibration.fingerprint import Fingerprint
from kvote.kernels import reference
from kvote.measure import Geometry
from kvote.spec import parse

SMALL = Geometry(4, 2, 16, torch.float32)
SHAPE = Fingerprint("made-up", 1, 4, 2, 16, (0.0,))


def test_the_bytes_of_a_token():
    assert Geometry().token_bytes == 2 * 8 * 128 * 2
    assert SMALL.token_bytes == 2 * 2 * 16 * 4


@pytest.mark.parametrize("call", ["packed", "as_it_comes"])
def test_both_ways_to_call_torch_are_attention(call):
    key, value = SMALL.tokens(50, batch=2)
    query = SMALL.query(batch=2)
    out = getattr(SMALL, call)(query, key, value)()
    law = reference.attend(query, key, value, scale=SMALL.scale)[0]
    torch.testing.assert_close(out.reshape(law.shape), law)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_filled_layer_answers_a_step_as_if_it_had_been_prefilled(batch):
    key, value = SMALL.tokens(70, batch)
    layer, step = SMALL.filled(parse("dense"), key, value), SMALL.step(70, batch)
    out = layer.attend(step).transpose(1, 2)
    law = reference.attend(
        step.query, torch.cat([key, step.key], 2), torch.cat([value, step.value], 2), scale=SMALL.scale
    )[0]
    torch.testing.assert_close(out, law)
    assert layer.seen == 71


def test_a_filled_layer_drops_what_its_method_drops():
    key, value = SMALL.tokens(200)
    layer = SMALL.filled(parse("streamingllm(sinks=2, window=30)"), key, value)
    assert layer.seen == 200
    assert layer.segment is not None
    assert layer.segment.length(0) <= 33


@pytest.mark.parametrize(
    "spec", ["dense", "h2o(budget=0.25)", "snapkv(budget=0.25)", "streamingllm(sinks=4, window=200)", "kivi(bits=4)"]
)
def test_a_prefilled_layer_is_one_that_was_fed(spec):
    key, value = SMALL.tokens(800)
    (layer,) = SMALL.prefilled(parse(spec), key, value)
    assert layer.seen == 800
    assert layer.prompt_left == 0
    if layer.method.keep.offers.drops:
        assert layer.activity.dropped == 600 - 4 * (spec.startswith("streaming"))
    before = layer.segment.length(0)
    layer.attend(SMALL.step(800))
    # Others make room for a burst of three, of which this token is the first.
    more = 1 if spec in ("dense", "snapkv(budget=0.25)", "kivi(bits=4)") else -2
    assert layer.segment.length(0) == before + more


def test_layers_that_share_tokens_are_one_crew():
    key, value = SMALL.tokens(300)
    first, second = SMALL.prefilled(parse("tidaldecode(top_k=20, first=0, reselect=0)"), key, value, layers=2)
    for layer in (first, second):
        layer.attend(SMALL.step(300))
    assert (first.activity.tokens_read, second.activity.tokens_read) == (301, 20)


def test_groups_of_heads_are_filled_each_with_its_own():
    heads = methods.razorattention(heads=example("razor", SHAPE), induction=0.5, echo=0.0, budget=50)
    key, value = SMALL.tokens(300)
    (layer,) = SMALL.prefilled(heads, key, value)
    assert [part.segment.length(0) for part in layer.parts] == [50, 300]
    torch.testing.assert_close(layer.parts[1].segment.decode([0], 0, 236)[0], key[:, :1, :236])


def test_a_prompt_shorter_than_its_end_is_refused():
    with pytest.raises(ValueError, match="A prompt of 64 tokens has nothing before its last 64"):
        SMALL.prefilled(parse("dense"), *SMALL.tokens(64))
