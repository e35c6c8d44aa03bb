import pytest
import torch

from kvote.kernels import reference
from kvote.measure import Geometry
from kvote.method import parse

SMALL = Geometry(4, 2, 16, torch.float32)


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
