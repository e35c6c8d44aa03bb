"""Prompts of a batch that are read without their padding, as each would be alone."""

import math
import random

import pytest
import tiny
import torch

import kvote
from kvote import InputError, UnsupportedModelError
from kvote.prepacked import Prepacked, bins_of

PADS = [0, 61, 30, 69, 55, 30, 0]
METHODS = [
    "dense",
    "tokenselect(top_k=5, sinks=2, window=6, chunk=1, theta=2.0)",
    "snapkv(budget=20, window=6)",
    "adakv(budget=20, window=6)",
    "h2o(budget=20)",
    "kivi(residual=32)",
    "streamingllm(sinks=2, window=9)",
]


@pytest.fixture
def net():
    return tiny.model()


def packed(net, method, tokens, mask):
    cache = tiny.cache(net, method)
    kvote.prefill(net, cache, tokens, mask)
    return cache


@pytest.mark.parametrize("method", METHODS)
def test_answers_are_those_of_the_padded_batch(net, method):
    tokens, mask = tiny.padded(len(PADS), 70, PADS)
    cache, padded = packed(net, method, tokens, mask), tiny.cache(net, method)
    assert cache.get_seq_length() == 69
    mine, other = (tiny.generate(net, tokens, each, mask) for each in (cache, padded))
    assert torch.equal(mine.sequences, other.sequences)
    torch.testing.assert_close(torch.stack(mine.logits), torch.stack(other.logits), atol=1e-4, rtol=1e-4)
    for layer in range(2):
        for one, two in zip(cache.positions(layer), padded.positions(layer), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("family", ["qwen3", "phi3-partial", "cohere"])
def test_it_holds_for_other_families(family):
    net = tiny.model(family)
    tokens, mask = tiny.padded(len(PADS), 70, PADS)
    mine, other = (
        tiny.generate(net, tokens, each, mask) for each in (packed(net, "dense", tokens, mask), tiny.cache(net))
    )
    torch.testing.assert_close(torch.stack(mine.logits), torch.stack(other.logits), atol=1e-4, rtol=1e-4)


def test_a_prompt_does_not_see_those_that_share_its_row(net):
    tokens, mask = tiny.padded(len(PADS), 70, PADS)
    changed = tokens.clone()
    changed[2, PADS[2] :] = tiny.ids(1, 70 - PADS[2], seed=5)
    one, two = (packed(net, "dense", each, mask) for each in (tokens, changed))
    assert Prepacked.of(mask[:, :-1].bool()).bins < len(PADS)
    for row, pad in enumerate(PADS):
        n = 69 - pad
        held = [cache.managed[1].segment.decode([row], 0, n) for cache in (one, two)]
        same = all(torch.equal(a, b) for a, b in zip(*held, strict=True))
        assert same == (row != 2)


def test_a_batch_without_padding_needs_none(net):
    tokens = tiny.ids(2, 20)
    mine, other = (tiny.generate(net, tokens, each) for each in (packed(net, "dense", tokens, None), None))
    torch.testing.assert_close(torch.stack(mine.logits), torch.stack(other.logits), atol=1e-4, rtol=1e-4)


def test_prompts_of_one_token_are_left_to_generate(net):
    cache = packed(net, "dense", tiny.ids(2, 1), None)
    assert cache.get_seq_length() == 0
    assert tiny.generate(net, tiny.ids(2, 1), cache).sequences.shape == (2, 9)


def test_rows_are_few_and_none_is_longer_than_the_longest_prompt():
    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randint(0, 100) for _ in range(draw.randint(1, 40))]
        bins = bins_of(lengths)
        assert sorted(prompt for each in bins for prompt in each) == [i for i, n in enumerate(lengths) if n]
        assert all(sum(lengths[prompt] for prompt in each) <= max(lengths) for each in bins)
        # First fit decreasing is never more than 11/9 of the fewest and a row.
        assert len(bins) <= 11 / 9 * math.ceil(sum(lengths) / max(max(lengths), 1)) * 1.2 + 1


def test_packing_and_unpacking_give_every_token_back():
    valid = tiny.padded(4, 9, [0, 3, 8, 5])[1].bool()
    laid = Prepacked.of(valid)
    x = torch.randn(4, 9, 2, 3)
    back = laid.unpack(laid.pack(x).transpose(1, 2)).transpose(1, 2)
    assert torch.equal(back[valid], x[valid])
    assert int(valid.sum()) <= laid.bins * laid.width < valid.numel()


def test_what_cannot_be_right_is_refused(net):
    tokens, mask = tiny.padded(2, 9, [3, 0])
    with pytest.raises(InputError, match="padded on the left"):
        packed(net, "dense", tokens, mask.flip(1))
    with pytest.raises(InputError, match=r"attention_mask is \[2, 9\] like input_ids; got \[1, 9\]"):
        packed(net, "dense", tokens, mask[:1])
    with pytest.raises(InputError, match="has seen 8 tokens; prefill takes an empty one"):
        kvote.prefill(net, packed(net, "dense", tokens, mask), tokens, mask)
    with pytest.raises(InputError, match=r"input_ids is \[rows, columns\]"):
        packed(net, "dense", tokens[0], None)
    with pytest.raises(UnsupportedModelError, match="has layers of the kind DynamicSlidingWindowLayer"):
        packed(tiny.model("gemma3"), "dense", tokens, mask)


def test_an_interrupted_pass_leaves_nothing_of_the_packing(net):
    tokens, mask = tiny.padded(2, 9, [3, 0])
    cache = tiny.cache(net)
    hook = net.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kvote.prefill(net, cache, tokens, mask)
    hook.remove()
    assert cache.announced.prepacked is None
    kvote.prefill(net, cache, tokens, mask)
    assert cache.get_seq_length() == 8
