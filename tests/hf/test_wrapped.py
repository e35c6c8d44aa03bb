"""Models inside others: adapters, prompts that are tuned, offloaded weights, wrappers around a language model."""

import copy
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import tiny
import torch
from zoo.build import build

import kvote
from kvote.hf.facts import facts_of

# Read everything here, so that answers are those of the default cache.
METHODS = ["dense", "h2o(budget=400)", "kivi", "tokenselect(top_k=400)", "streamingllm(sinks=2, window=400)"]
pytestmark = pytest.mark.filterwarnings("ignore")


def fresh(**changes: Any) -> Any:
    return copy.deepcopy(tiny.model(**changes))


def answers(net: Any, cache: Any = None) -> list[list[int]]:
    tokens = tiny.ids(1, 12)
    with torch.no_grad():
        return net.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=6,
        ).tolist()


@pytest.mark.parametrize("method", METHODS)
def test_adapters_are_looked_through(method):
    net = peft.get_peft_model(fresh(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).eval()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
    expected = answers(net)
    assert answers(net, kvote.Cache(net, method)) == expected
    with net.disable_adapter():
        plain = answers(net)
        assert answers(net, kvote.Cache(net, method)) == plain
    assert plain != expected
    net.merge_adapter()
    assert answers(net, kvote.Cache(net, method)) == answers(net)


@pytest.mark.parametrize("method", ["dense", "h2o(budget=400)"])
def test_tuned_prompts_work(method):
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    net = peft.get_peft_model(fresh(), config).eval()
    cache = kvote.Cache(net, method)
    assert answers(net, cache) == answers(net)
    assert cache.get_seq_length() == 4 + 12 + 5


@pytest.mark.parametrize("method", ["dense", "kivi"])
def test_a_tuned_prefix_is_refused_since_it_brings_a_cache_of_its_own(method):
    net = peft.get_peft_model(fresh(), peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()
    with pytest.raises(
        kvote.UnsupportedModelError, match="LlamaForCausalLM does not store keys in the cache that it is"
    ):
        kvote.Cache(net, method)
    answers(net)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("method", METHODS)
def test_offloaded_weights_run_through_their_hooks(method, where, tmp_path: Path):
    net = fresh()
    expected = answers(net)
    if where == "memory":
        net = accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    else:
        net = accelerate.disk_offload(net, str(tmp_path), execution_device=torch.device("cpu"))
    assert next(net.parameters()).is_meta
    assert answers(net, kvote.Cache(net, method)) == expected


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "InternVLForConditionalGeneration"])
def test_the_language_model_of_a_vision_model_is_found(name):
    net = build(name)
    facts = facts_of(net).layers.values()
    assert facts
    assert all(layer.rotated and layer.rope is not None for layer in facts)
