"""Chance, and the test that says what beats it."""

import tiny
import torch

import kvote


def test_the_sign_test_counts_only_what_one_of_them_answered():
    from baselines import verdict

    assert verdict("1" * 40, "1" * 40) == ("equals", 1.0)
    assert verdict("1" * 20 + "0" * 20, "1" * 12 + "0" * 28) == ("beats", 2 / 2**8)
    assert verdict("1" * 7, "0" * 7)[0] == "equals"
    assert verdict("0" * 8 + "1", "1" * 8 + "0")[0] == "equals"
    assert verdict("0" * 12, "1" * 12)[0] == "loses"


def test_random_prompts_read_as_many_tokens_and_generated_tokens_all():
    from baselines import random_prompts

    net = tiny.model()
    cache = kvote.Cache(net, random_prompts(12, block=4))
    tiny.feed(net, cache, tiny.ids(2, 52))
    assert [(layer.tokens_read, layer.selections) for layer in cache.report().layers] == [(12, 2)] * 2
    tiny.feed(net, cache, tiny.ids(2, 1))
    assert [layer.tokens_read for layer in cache.report().layers] == [53, 53]


def test_random_steps_read_as_many_tokens_and_only_when_generating():
    from baselines import random_steps

    net = tiny.model()
    cache = kvote.Cache(net, random_steps(12, dense=1))
    whole = kvote.Cache(net, "dense")
    torch.testing.assert_close(tiny.feed(net, cache, tiny.ids(2, 50)), tiny.feed(net, whole, tiny.ids(2, 50)))
    tiny.feed(net, cache, tiny.ids(2, 1))
    layers = cache.report().layers
    assert [layer.tokens_read for layer in layers] == [51, 12]
    assert [layer.selections for layer in layers] == [0, 2]
