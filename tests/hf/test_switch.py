"""The name of kvote's attention is the native one to all who compare it."""

import copy
import pickle

import pytest
import tiny
import torch

import kvote
from kvote.hf.mask import MaskCarrier
from kvote.hf.switch import AttentionName, attach, is_attached


def test_a_name_is_found_as_kvotes_and_compares_as_the_native_one():
    name = AttentionName("sdpa")
    assert {"kvote_over_sdpa": 1, "sdpa": 2}[name] == 1
    native, other = "sdpa", "eager"
    assert name == native
    assert native == name
    assert (name != native) is False
    assert (native != name) is False
    assert name in [other, native]
    assert name != other
    assert other != name


def test_what_is_saved_or_copied_opens_without_kvote():
    net = tiny.model()
    kvote.Cache(net)
    assert type(pickle.loads(pickle.dumps(net.config))._attn_implementation) is str
    assert "kvote" not in net.config.to_json_string()
    assert is_attached(copy.deepcopy(net))


@pytest.mark.parametrize("native", ["sdpa", "eager"])
def test_to_code_that_looks_into_it_a_mask_is_the_native_one(native):
    net = copy.deepcopy(tiny.model(native=native))
    masks = []

    def note(module, args, kwargs):
        masks.append(kwargs["attention_mask"])

    net.model.layers[0].self_attn.register_forward_pre_hook(note, with_kwargs=True)
    tokens, padding = tiny.padded(2, 5, [2, 0])
    tiny.feed(net, None, tokens, padding)
    attach(net)
    tiny.feed(net, None, tokens, padding)
    expected, carrier = masks
    assert isinstance(carrier, MaskCarrier)
    assert carrier.shape == expected.shape
    assert carrier.size(-1) == expected.size(-1)
    assert torch.equal(carrier[:, :, 1:], expected[:, :, 1:])
    assert torch.equal(carrier | True, expected | True) if native == "sdpa" else torch.equal(carrier + 1, expected + 1)
    assert torch.equal(carrier.to(torch.float64), expected.to(torch.float64))
    assert carrier.to("cpu") is carrier
