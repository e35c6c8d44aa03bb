"""Padding behind tokens: it is not stored, but its query answers as with any other cache."""

from typing import Any

import pytest
import scored
import tiny
import torch
from calibrated import double_sparsity
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import kvote

# All of them keep and read everything, exactly.
WHOLE: dict[str, Any] = {
    "dense": "dense",
    "streamingllm": "streamingllm(sinks=2, window=500)",
    "tokenselect": "tokenselect(top_k=500, sinks=2, window=6, chunk=4)",
    "random": "random(top_k=500, sinks=2, window=6, chunk=4)",
    "h2o": "h2o(budget=500)",
    "snapkv": "snapkv(budget=500, window=6)",
    "pyramidkv": "pyramidkv(budget=500, window=6)",
    "knorm": "knorm(budget=500)",
    "randomkeep": "randomkeep(budget=500, window=6)",
    "tidaldecode": "tidaldecode(top_k=500, first=0)",
    "quest": "quest(token_budget=500, dense_layers=0)",
    "doublesparsity": double_sparsity(top_k=500, dense_layers=0),
    "cake": "cake(budget=500, window=6)",
    "ems": "ems(budget=500, window=6)",
    "mikv": "mikv(budget=500)",
    "kivi": "kivi(residual=512)",
    "razorattention": "razorattention(heads='{razor}', induction=0.5)",
    "duoattention": "duoattention(heads='{duo}', window=500)",
    "think": "think(ratio=0.0, window=6, recent=5)",
    "xkv": "xkv(group=2, key_rank=1.0, value_rank=1.0)",
    "kivi-tokenselect": "kivi(residual=512) | tokenselect(top_k=500, sinks=2, window=6, chunk=4)",
    "xkv-tokenselect": "xkv(group=2, key_rank=1.0, value_rank=1.0) | tokenselect(top_k=500, sinks=2, window=6)",
}
SCORES = [[0.1, 0.9], [0.8, 0.2]]
COLUMNS = 40


@pytest.fixture(params=WHOLE.values(), ids=WHOLE)
def method(request: pytest.FixtureRequest) -> Any:
    return request.param if callable(request.param) else spec_for(tiny.model(), request.param)


def spec_for(net: Any, spec: str) -> str:
    return spec.replace("{razor}", scored.file(scored.razor(net, SCORES))).replace(
        "{duo}", scored.file(scored.duo(net, SCORES))
    )


def right_padded(columns: int = COLUMNS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three rows of which two end in padding, one of them begins with it as well, and one has some in the middle."""
    tokens, mask = tiny.ids(3, columns, seed), torch.ones(3, columns, dtype=torch.long)
    for row, start, stop in ((0, columns - 9, columns), (1, 0, 5), (1, columns - 3, columns), (2, 20, 24)):
        tokens[row, start:stop], mask[row, start:stop] = 0, 0
    return tokens, mask


def agree(net: Any, method: Any, turns: list[tuple[Tensor, Tensor]], passes: int = 0) -> kvote.Cache:
    """Logits of all columns behind the first token of their row are those with the default cache."""
    mine, native = tiny.cache(net, method), DynamicCache(config=net.config)
    whole = torch.empty(len(turns[0][0]), 0, dtype=torch.long)
    for tokens, mask in turns:
        whole = torch.cat([whole, mask], dim=1)
        mine.expect(tokens.shape[1])
        logits = [tiny.feed(net, cache, tokens, whole, passes) for cache in (mine, native)]
        at = whole.cumsum(dim=1)[:, -tokens.shape[1] :] > 0
        torch.testing.assert_close(logits[0][at], logits[1][at], atol=2e-4, rtol=2e-4)
    for row, count in enumerate(whole.sum(dim=1).tolist()):
        assert all(len(lane) == count for lane in mine.positions(1)[row])
    return mine


def test_prompts_that_end_in_padding_answer_as_natively(method):
    agree(tiny.model(), method, [right_padded()])


def test_a_later_turn_may_end_in_padding(method):
    agree(tiny.model(), method, [right_padded(), right_padded(26, seed=1), (tiny.ids(3, 1), torch.ones(3, 1).long())])


def test_passes_may_be_padding_only(method):
    agree(tiny.model(), method, [right_padded()], passes=4)


def test_generate_goes_on_behind_padding_as_natively(method):
    """There, positions begin anew behind the padding."""
    net = tiny.model()
    tokens, mask = right_padded()
    expected = tiny.generate(net, tokens, mask=mask).sequences
    assert torch.equal(tiny.generate(net, tokens, tiny.cache(net, method), mask).sequences, expected)


@pytest.mark.parametrize("spec", ["dense", "tokenselect(top_k=500)", "h2o(budget=500)", "duoattention(heads='{duo}')"])
def test_learned_sinks_take_part(spec):
    net = tiny.model("gpt-oss")
    with torch.no_grad():
        for layer in net.model.layers:
            layer.self_attn.sinks.copy_(torch.linspace(-1, 2, 4))
    if "{duo}" in spec:
        heads = net.config.num_key_value_heads
        spec = spec.replace("{duo}", scored.file(scored.duo(net, [[0.1, 0.9][:heads]] * 2)))
    mine, native = tiny.cache(net, spec), DynamicCache(config=net.config)
    tokens, mask = right_padded()
    logits = [tiny.feed(net, cache, tokens, mask) for cache in (mine, native)]
    at = mask.cumsum(dim=1) > 0
    torch.testing.assert_close(logits[0][at], logits[1][at], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("spec", ["dense", "tokenselect(top_k=500)", "kivi(residual=512)"])
def test_a_soft_cap_is_kept_to(spec):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma2", vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, attn_logit_softcapping=3.0,
        layer_types=["sliding_attention", "full_attention"], initializer_range=0.2, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    net = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    agree(net, spec, [right_padded()])


def test_what_was_merged_or_stays_in_few_bits_answers_padding_too():
    """These have no slot, but every query reads them."""
    net = tiny.model()
    for spec in ("mikv(budget=12)", "razorattention(heads='{razor}', induction=0.5, sinks=2, least=8, share=0.1)"):
        tokens, mask = tiny.ids(2, COLUMNS), torch.ones(2, COLUMNS, dtype=torch.long)
        cache = tiny.cache(net, spec_for(net, spec))
        tiny.feed(net, cache, tokens, mask)
        more, longer = tiny.ids(2, 2, seed=1), torch.cat([mask, torch.tensor([[1, 0], [1, 1]])], dim=1)
        other = tiny.cache(net, spec_for(net, spec))
        tiny.feed(net, other, tokens, mask)
        got = tiny.feed(net, cache, more, longer)
        # A token in the place of the padding reads the same and itself.
        assert bool(got.isfinite().all())
        whole = tiny.feed(net, other, more[:, :1], longer[:, :-1])
        torch.testing.assert_close(got[:, 0], whole[:, 0], atol=2e-4, rtol=2e-4)
        assert not torch.allclose(got[0, 1], torch.zeros(()), atol=1e-3)
