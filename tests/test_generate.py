"""generate() on real transformers models: budgets that read everything give what the default cache gives."""

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

WHOLE = {
    "dense": "dense",
    "streamingllm": "streamingllm(sinks=2, window=200)",
    "tokenselect": "tokenselect(top_k=200, sinks=2, window=8, chunk=8, tail=3)",
    "random": "random(top_k=200, sinks=2, window=8, chunk=8, tail=3)",
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 10},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "prefill chunks of 4": {"prefill_chunk_size": 4},
    "prefill chunks of 16": {"prefill_chunk_size": 16},
}


@pytest.fixture(params=WHOLE.values(), ids=WHOLE)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def prompt(pads: int = 5) -> tuple[Tensor, Tensor]:
    return tiny.padded(2, 21, [pads, 0])


def close(mine: Any, other: Any) -> None:
    """Same tokens, and logits within 1e-4."""
    assert torch.equal(mine.sequences, other.sequences)
    for a, b in zip(mine.logits, other.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_generate_equals_the_default_cache(family, way):
    tokens, mask = prompt()
    net = tiny.model(family)
    torch.manual_seed(7)
    expected = tiny.generate(net, tokens, mask=mask, **WAYS[way])
    for method in (WHOLE["dense"], WHOLE["tokenselect"]):
        cache = tiny.cache(net, method)
        torch.manual_seed(7)
        close(tiny.generate(net, tokens, cache, mask, **WAYS[way]), expected)
        assert all(layer.calls > 0 for layer in cache.report().layers)


@pytest.mark.parametrize("way", WAYS)
def test_every_method_equals_the_default_cache(method, way):
    tokens, mask = prompt()
    net = tiny.model()
    torch.manual_seed(7)
    expected = tiny.generate(net, tokens, mask=mask, **WAYS[way])
    torch.manual_seed(7)
    close(tiny.generate(net, tokens, tiny.cache(net, method), mask, **WAYS[way]), expected)


def repeating() -> Tensor:
    """A prompt whose pieces come again, so that prompt lookup finds candidates, right and wrong ones."""
    piece = tiny.ids(1, 6, seed=3)
    return torch.cat([piece, tiny.ids(1, 3, seed=4), piece, tiny.ids(1, 2, seed=5), piece, piece], dim=1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prompt_lookup_equals_plain_greedy(family):
    tokens = repeating()
    expected = tiny.generate(tiny.model(family), tokens, max_new_tokens=24).sequences
    net = tiny.model(family)
    for method in (WHOLE["dense"], WHOLE["tokenselect"], WHOLE["streamingllm"]):
        got = tiny.generate(net, tokens, tiny.cache(net, method), max_new_tokens=24, prompt_lookup_num_tokens=4)
        assert torch.equal(got.sequences, expected)


def test_prompt_lookup_really_crops(monkeypatch, method):
    net = tiny.model()
    cache, cropped = tiny.cache(net, method), []
    crop = cache.crop
    monkeypatch.setattr(cache, "crop", lambda count: (cropped.append(-count), crop(count)))
    got = tiny.generate(net, repeating(), cache, max_new_tokens=24, prompt_lookup_num_tokens=4).sequences
    assert max(cropped) > 0
    assert cache.get_seq_length() == got.shape[1] - 1


# Prompt lookup needs repeated words, whose equal keys tie in a vote; so the selecting reader here draws lots instead.
@pytest.mark.parametrize(
    "spec", ["streamingllm(sinks=2, window=9)", "random(top_k=4, sinks=2, window=4, chunk=1, tail=0)"]
)
def test_prompt_lookup_equals_greedy_when_a_method_reads_little(spec):
    net = tiny.model()
    expected = tiny.generate(net, repeating(), tiny.cache(net, spec), max_new_tokens=24).sequences
    got = tiny.generate(net, repeating(), tiny.cache(net, spec), max_new_tokens=24, prompt_lookup_num_tokens=4)
    assert torch.equal(got.sequences, expected)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_conversation_continues_from_its_cache(family):
    tokens, mask = prompt()
    net = tiny.model(family)
    for method in (WHOLE["dense"], WHOLE["tokenselect"]):
        cache, history, seen = tiny.cache(net, method), tokens, mask
        for turn in range(3):
            answer = tiny.generate(net, history, cache, seen, max_new_tokens=4).sequences
            history = torch.cat([answer, tiny.ids(2, 5, seed=turn)], dim=1)
            seen = torch.cat([seen, torch.ones(2, history.shape[1] - seen.shape[1], dtype=torch.long)], dim=1)
        last = tiny.generate(net, history, cache, seen)
        close(last, tiny.generate(tiny.model(family), history, mask=seen))
        net = tiny.model(family)


def test_a_prompt_cache_is_copied_and_continued_twice(method):
    net = tiny.model()
    document, questions = tiny.ids(1, 30), [tiny.ids(1, 4, seed=1), tiny.ids(1, 6, seed=2)]
    cache = tiny.cache(net, method)
    tiny.feed(net, cache, document)
    asked = [torch.cat([document, question], dim=1) for question in questions]
    got = [tiny.generate(net, ids, copy.deepcopy(cache)) for ids in asked]
    for ids, mine in zip(asked, got, strict=True):
        close(mine, tiny.generate(tiny.model(), ids))


@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_head_sizes(family, head_dim):
    changes = {"head_dim": head_dim, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokens, mask = prompt()
    expected = tiny.generate(tiny.model(family, **changes), tokens, mask=mask)
    net = tiny.model(family, **changes)
    for method in (WHOLE["dense"], WHOLE["tokenselect"]):
        close(tiny.generate(net, tokens, tiny.cache(net, method), mask), expected)


@pytest.mark.parametrize("groups", range(1, 9))
def test_gqa_groups(groups):
    changes = {"head_dim": 16, "num_attention_heads": 2 * groups, "num_key_value_heads": 2, "hidden_size": 32 * groups}
    tokens, mask = prompt()
    expected = tiny.generate(tiny.model(**changes), tokens, mask=mask)
    net = tiny.model(**changes)
    for method in (WHOLE["dense"], WHOLE["tokenselect"]):
        close(tiny.generate(net, tokens, tiny.cache(net, method), mask), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "cohere", "gpt-oss"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float16, 0.003)], ids=str)
def test_half_precision_is_as_close_as_its_rounding(family, dtype, tolerance):
    tokens, mask = prompt()
    net = copy.deepcopy(tiny.model(family)).to(dtype)
    expected = tiny.feed(net, None, tokens, mask).float()[mask.bool()]
    for method in WHOLE.values():
        got = tiny.feed(net, tiny.cache(net, method), tokens, mask).float()[mask.bool()]
        assert (got - expected).norm() / expected.norm() < tolerance


def test_a_cache_that_is_too_small_answers_differently():
    tokens = tiny.ids(1, 60)
    expected = tiny.generate(tiny.model(), tokens)
    net = tiny.model()
    for method in ("streamingllm(sinks=1, window=4)", "tokenselect(top_k=2, sinks=1, window=2, chunk=4)"):
        got = tiny.generate(net, tokens, tiny.cache(net, method))
        assert (got.logits[0] - expected.logits[0]).abs().max() > 0.01
