"""Dense: what transformers itself does, to rounding."""

import pytest
import tiny
import torch
import transformers


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("pads", [0, 6])
def test_dense_equals_the_native_attention(family, pads):
    tokens, mask = tiny.padded(2, 30, [pads, 0])
    expected = tiny.feed(tiny.model(family), None, tokens, mask)
    net = tiny.model(family)
    for passes in (0, 1, 7):
        got = tiny.feed(net, tiny.cache(net), tokens, mask, passes)
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


def test_dense_keeps_and_reads_everything():
    net = tiny.model()
    cache = tiny.cache(net)
    tiny.feed(net, cache, tiny.ids(1, 100), passes=30)
    assert all(lane.tolist() == list(range(100)) for lane in cache.positions(0)[0])
    assert cache.report().layers[0].tokens_read == 100
    assert cache.report().layers[0].dropped == 0


def test_dense_holds_as_many_bytes_as_the_tokens_need():
    net = tiny.model()
    cache = tiny.cache(net)
    tiny.feed(net, cache, tiny.ids(1, 4096))
    tokens = 2 * 2 * 4096 * (2 * 16 * 4 + 4)
    assert tokens <= cache.nbytes() <= 1.2 * tokens


def test_soft_capped_logits_are_honoured():
    config = transformers.Gemma2Config(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        attn_logit_softcapping=0.5,
        query_pre_attn_scalar=1,
        initializer_range=0.3,
        sliding_window=8,
    )
    torch.manual_seed(0)
    net = transformers.Gemma2ForCausalLM(config).eval()
    net.set_attn_implementation("eager")
    tokens = tiny.ids(1, 30)
    expected = tiny.feed(net, None, tokens)
    for method in ("dense", "tokenselect(top_k=100)"):
        got = tiny.feed(net, tiny.cache(net, method), tokens, passes=11)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
