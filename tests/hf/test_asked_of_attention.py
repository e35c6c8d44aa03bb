"""What callers ask of attention beside an answer: weights, gradients, compilation, another engine."""

import copy
from typing import Any

import pytest
import tiny
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import kvote

METHODS = ["dense", "tokenselect(top_k=400)", "streamingllm(sinks=2, window=400)", "kivi", "h2o(budget=400)"]


def fresh(family: str = "llama", **changes: Any) -> Any:
    return copy.deepcopy(tiny.model(family, **changes))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["call", "config", "generate"])
def test_attention_weights_are_refused_and_other_caches_still_give_them(method, where):
    net = fresh(native="eager")
    cache = kvote.Cache(net, method)
    ask = {} if where == "config" else {"output_attentions": True}
    if where == "config":
        net.config.output_attentions = True
    run = (
        tiny.generate
        if where == "generate"
        else lambda net, ids, cache=None, **kw: net(ids, past_key_values=cache, **kw)
    )
    with pytest.raises(kvote.InputError, match="returns no attention weights"), torch.no_grad():
        run(net, tiny.ids(1, 6), cache, **ask)
    with torch.no_grad():
        given = run(net, tiny.ids(1, 6), **ask).attentions
    first = given[0][0] if where == "generate" else given[0]
    assert first.shape == (1, 4, 6, 6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("trained", ["weights", "inputs"])
def test_gradients_through_a_kvote_cache_are_refused(method, trained):
    net = fresh()
    cache = kvote.Cache(net, method)
    embedded = net.get_input_embeddings()(tiny.ids(1, 6)).detach()
    net.requires_grad_(trained == "weights")
    # Without torch.no_grad() a model answers as with any cache; only who asks for gradients is told.
    logits = net(inputs_embeds=embedded.requires_grad_(trained == "inputs"), past_key_values=cache).logits
    with pytest.raises(kvote.InputError, match="passes no gradients on"):
        logits.logsumexp(-1).sum().backward()


def test_a_model_that_needs_no_gradients_runs_where_they_are_recorded():
    net = fresh().requires_grad_(False)
    net(tiny.ids(1, 6), past_key_values=kvote.Cache(net))


@pytest.mark.parametrize("how", ["module", "forward"])
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_model_answers_as_before(how, method):
    net = fresh()
    tokens = tiny.ids(1, 12)
    expected = tiny.generate(net, tokens).sequences
    compiled = net
    if how == "module":
        compiled = torch.compile(net, backend="eager")
    else:
        net.forward = torch.compile(net.forward, backend="eager")
    cache = kvote.Cache(compiled, method)
    assert torch.equal(tiny.generate(compiled, tokens, cache).sequences, expected)
    assert cache.get_seq_length() == 12 + 7


@pytest.mark.parametrize("native", ["sdpa", "eager"])
def test_continuous_batching_works_after_a_kvote_cache(native):
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [tiny.ids(1, 12)[0].tolist(), tiny.ids(1, 9, seed=1)[0].tolist()]

    # By itself it takes, and fills, as much memory as there is.
    small = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)

    def run(net: Any) -> list[list[int]]:
        made = net.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
        return [out.generated_tokens for out in made.values()]

    net = fresh(native=native)
    before = run(net)
    expected = tiny.generate(net, torch.tensor(prompts[:1])).sequences
    cache = kvote.Cache(net)
    assert run(net) == before
    assert torch.equal(tiny.generate(net, torch.tensor(prompts[:1]), cache).sequences, expected)


def test_answers_are_contiguous():
    from kvote.hf.attention import attention

    net, seen = fresh(), []
    cache = kvote.Cache(net, "streamingllm(sinks=1, window=4)")
    project = net.model.layers[0].self_attn.o_proj
    project.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    tokens, mask = tiny.padded(2, 9, [3, 0])
    tiny.feed(net, cache, tokens, mask)
    assert seen == [True]
    assert callable(attention)
