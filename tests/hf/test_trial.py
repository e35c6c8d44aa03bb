"""What a model does with attention is found out by running it, once, and without a trace."""

import copy
import pickle
from typing import Any

import peft
import pytest
import tiny
import torch
from zoo.build import build

import kvote
from kvote.hf import facts as seam
from kvote.hf.facts import facts_of, find_rope


def fresh(family: str = "llama", **changes: Any) -> Any:
    """A model of its own: a copy, so that no other test has tried it."""
    return copy.deepcopy(tiny.model(family, **changes))


@pytest.fixture
def trials(monkeypatch):
    """The models that were tried, in order."""
    tried: list[Any] = []
    run = seam.find_out

    def counted(model):
        tried.append(model)
        return run(model)

    monkeypatch.setattr(seam, "find_out", counted)
    return tried


def test_a_model_is_tried_once(trials):
    net = fresh()
    for method in ("dense", "tokenselect", "kivi"):
        kvote.Cache(net, method)
    assert trials == [net]
    assert facts_of(net).seconds > 0


CHANGES = {
    "weights": lambda net: net.model.layers[0].self_attn.k_proj.weight.data.mul_(2),
    "loaded weights": lambda net: net.load_state_dict({k: v + 1e-3 for k, v in net.state_dict().items()}),
    "config": lambda net: setattr(net.config, "rms_norm_eps", 1e-3),
    "a layer taken out": lambda net: net.model.layers.__delitem__(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_is_tried_again(trials, change):
    net = fresh()
    kvote.Cache(net)
    if change == "a layer taken out":
        net.config.num_hidden_layers = 1
    with torch.no_grad():
        CHANGES[change](net)
    kvote.Cache(net)
    assert len(trials) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_makes_another_model(trials):
    net = fresh()
    kvote.Cache(net)
    adapted = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    kvote.Cache(adapted)
    adapted.merge_adapter()
    kvote.Cache(adapted)
    assert len(trials) == 3


def test_a_trial_leaves_the_model_and_the_random_state_as_they_were():
    net = fresh(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, max_position_embeddings=32)
    # A long text has changed the rotary module's frequencies; a trial on a few tokens must not change them back.
    tiny.feed(net, None, tiny.ids(1, 60))
    net.train()
    net.model.layers[1].eval()
    modes = [module.training for module in net.modules()]
    held = {name: value.clone() for name, value in net.named_buffers()}
    seen = vars(net.model.rotary_emb)["max_seq_len_cached"]
    calls: list[Any] = []
    handle = net.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in net.modules()]
    state = torch.random.get_rng_state()
    kvote.Cache(net, "tokenselect")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, held[name]) for name, value in net.named_buffers())
    assert vars(net.model.rotary_emb)["max_seq_len_cached"] == seen
    assert [(module._forward_hooks, module._forward_pre_hooks) for module in net.modules()] == hooks
    assert not calls
    assert handle.id in net.model.layers[0]._forward_hooks
    assert all(p.grad is None for p in net.parameters())


def test_a_refused_model_keeps_its_attention_and_is_not_tried_again(trials):
    net = build("DiffLlamaForCausalLM")
    for _ in range(2):
        with pytest.raises(kvote.UnsupportedModelError, match="attends 2 times to the keys of layer 0"):
            kvote.Cache(net)
    assert type(net.config._attn_implementation) is str
    assert len(trials) == 1


def test_an_interrupted_trial_leaves_the_attention_as_it_was():
    net = fresh()

    def stop(*_):
        raise KeyboardInterrupt

    # A hook of a package that runs the model is part of it.
    stop.__module__ = "accelerate.hooks"
    handle = net.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        kvote.Cache(net)
    handle.remove()
    assert type(net.config._attn_implementation) is str
    kvote.Cache(net)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("DogeForCausalLM", "gives the attention of layer 0 a mask of its own"),
        ("DeepseekV3ForCausalLM", "caches latents"),
        ("FalconForCausalLM", "does not route attention through transformers' AttentionInterface"),
        ("PaliGemmaForConditionalGeneration", "is not causal"),
        ("MiniMaxForCausalLM", "does not run on a few tokens with transformers' default cache"),
        ("RwkvForCausalLM", "but in one of its own"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_reason(name, reason):
    with pytest.raises(kvote.UnsupportedModelError, match=f"{name}.*{reason}"):
        kvote.Cache(build(name))


def test_weights_without_numbers_are_refused():
    small = tiny.model(seed=3)
    with torch.device("meta"):
        net = type(small)(small.config)
    with pytest.raises(kvote.UnsupportedModelError, match="weights of LlamaForCausalLM are on the meta device"):
        kvote.Cache(net)


@pytest.mark.parametrize("thing", [None, "gpt2", lambda x: x, torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(kvote.InputError, match="A cache is made for a loaded model"):
        kvote.Cache(thing)


def test_layers_that_rotate_nothing_have_a_rope_that_does_nothing():
    net = build("SmolLM3ForCausalLM")
    facts = facts_of(net).layers
    plain = [index for index, layer in facts.items() if not layer.rotated]
    assert plain
    assert len(plain) < len(facts)
    x, rope = torch.randn(1, 2, 7, 16), find_rope(net, plain[0])
    assert torch.equal(rope.apply(x, rope.contiguous(7, x.device)), x)


@pytest.mark.parametrize("name", ["GlmForCausalLM", "NanoChatForCausalLM", "PhiForCausalLM", "StableLmForCausalLM"])
def test_rotations_of_every_form_are_undone(name):
    net = build(name)
    facts = facts_of(net).layers
    assert any(layer.rotated for layer in facts.values())
    assert all(layer.rope is not None for layer in facts.values())


def test_keys_normalised_after_their_rotation_are_refused_only_where_they_must_be_moved():
    net = build("HunYuanDenseV1ForCausalLM")
    kvote.Cache(net, "dense")
    with pytest.raises(kvote.UnsupportedModelError, match="HunYuanDenseV1ForCausalLM rotates keys in a way"):
        kvote.Cache(net, "tokenselect")


def test_positions_of_an_image_are_refused_when_they_come():
    net = build("Qwen2VLForConditionalGeneration")
    tokens = tiny.ids(1, 6) % 50 + 3
    text = torch.arange(6).expand(3, 1, 6)
    image = text + torch.tensor([0, 1, 2]).reshape(3, 1, 1)
    with torch.no_grad():
        net(tokens, position_ids=text, past_key_values=kvote.Cache(net, "tokenselect"))
        net(tokens, position_ids=image, past_key_values=kvote.Cache(net, "dense"))
        with pytest.raises(kvote.UnsupportedModelError, match="positions in three dimensions"):
            net(tokens, position_ids=image, past_key_values=kvote.Cache(net, "tokenselect"))


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


def long_phi() -> Any:
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    return fresh(
        "phi3",
        rope_parameters={**LONGROPE, **factors},
        max_position_embeddings=128,
        original_max_position_embeddings=32,
    )


def test_a_model_that_throws_its_cache_away_is_stopped_there():
    net = long_phi()
    tokens = tiny.ids(1, 20)
    expected = tiny.generate(net, tokens).sequences
    assert torch.equal(tiny.generate(net, tokens, kvote.Cache(net)).sequences, expected)
    with pytest.raises(kvote.UnsupportedModelError, match="more than 32 tokens, and would throw the cache away"):
        tiny.generate(net, tiny.ids(1, 28), kvote.Cache(net))
    tiny.generate(net, tiny.ids(1, 28))
    other = copy.deepcopy(net)
    assert pickle.loads(pickle.dumps(net)).generate(tokens, max_new_tokens=1).shape == (1, 21)
    kvote.detach(net)
    assert tiny.generate(net, tiny.ids(1, 28)).sequences.shape == (1, 36)
    with pytest.raises(kvote.UnsupportedModelError, match="more than 32 tokens"):
        tiny.generate(other, tiny.ids(1, 28), kvote.Cache(other))


def test_detach_gives_the_model_back():
    net = fresh()
    before = dict(vars(net))
    cache = kvote.Cache(net)
    kvote.detach(net)
    assert type(net.config._attn_implementation) is str
    assert vars(net).keys() == before.keys()
    with pytest.raises(kvote.InactiveCacheError, match="without kvote's attention"):
        tiny.feed(net, cache, tiny.ids(1, 5))
    tiny.feed(net, kvote.Cache(net), tiny.ids(1, 5))
