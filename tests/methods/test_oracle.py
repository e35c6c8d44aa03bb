"""The oracle: every head reads the tokens with the largest logits, and no others."""

from typing import Any

import tiny
import torch
from masking import decoded, top
from torch import Tensor

PROMPT, STEPS = 90, 9


def best(k: int) -> Any:
    def mask(layer: int, logits: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
        return top(logits, k)

    return mask


def test_generated_tokens_read_the_tokens_with_the_largest_logits():
    net, tokens = tiny.model(), tiny.ids(2, PROMPT + STEPS)
    expected = decoded(net, tokens, PROMPT, best(24))
    cache = tiny.cache(net, "oracle(top_k=24, tail=0)")
    tiny.feed(net, cache, tokens[:, :PROMPT])
    got = tiny.feed(net, cache, tokens[:, PROMPT:], passes=1)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert [layer.tokens_read for layer in cache.report().layers] == [24] * len(cache.layers)


def test_the_tail_of_a_prompt_reads_as_if_it_were_generated():
    net, tokens = tiny.model(), tiny.ids(1, PROMPT + STEPS)
    one, other = (tiny.cache(net, f"oracle(top_k=24, tail={STEPS})") for _ in range(2))
    whole = tiny.feed(net, one, tokens)
    other.expect(PROMPT, question_follows=True)
    tiny.feed(net, other, tokens[:, :PROMPT])
    stepwise = tiny.feed(net, other, tokens[:, PROMPT:], passes=1)
    torch.testing.assert_close(whole[:, -STEPS:], stepwise[:, -STEPS:], atol=1e-4, rtol=1e-4)


def test_a_list_that_holds_everything_is_dense():
    net, tokens = tiny.model(), tiny.ids(1, PROMPT)
    dense, oracle = (tiny.feed(net, tiny.cache(net, spec), tokens) for spec in ("dense", "oracle(top_k=90)"))
    torch.testing.assert_close(dense, oracle, atol=1e-5, rtol=1e-5)
