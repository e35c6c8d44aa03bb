"""What a model does with attention is found out by running it, once, and without a trace."""

import copy
import pickle
import threading
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
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
    "another rotary module": lambda net: setattr(net.model, "rotary_emb", copy.deepcopy(net.model.rotary_emb)),
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


def test_threads_that_make_the_first_cache_wait_for_each_other(trials):
    net = fresh().train()
    made: list[Any] = []

    def make() -> None:
        made.append(kvote.Cache(net, "tokenselect"))

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3
    assert len(trials) == 1
    assert all(module.training for module in net.modules())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("wrap", ["adapter", "compiled"])
def test_a_model_that_throws_its_cache_away_is_stopped_below_wrappers_too(wrap):
    net = long_phi()
    if wrap == "adapter":
        net = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["qkv_proj"])).eval()
    else:
        net = torch.compile(net, backend="eager")
    tokens = tiny.ids(1, 28)
    ask = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False}
    cache = kvote.Cache(net)
    with pytest.raises(kvote.UnsupportedModelError, match="more than 32 tokens"), torch.no_grad():
        net.generate(input_ids=tokens, past_key_values=cache, **ask)


def test_an_attention_of_the_users_own_stays_where_kvote_refuses_it():
    def doubled(module, query, key, value, mask, scaling=None, **kwargs):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=2 * scaling, **kwargs)

    AttentionInterface.register("doubled", doubled)
    net = fresh()
    net.set_attn_implementation("doubled")
    expected = tiny.generate(net, tiny.ids(1, 9)).sequences
    with pytest.raises(kvote.UnsupportedModelError):
        kvote.Cache(net)
    assert net.config._attn_implementation == "doubled"
    assert torch.equal(tiny.generate(net, tiny.ids(1, 9)).sequences, expected)


def test_a_refused_model_leaves_one_that_shares_its_config_attached():
    net = fresh()
    cache = kvote.Cache(net)

    class Odd(type(net)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("odd")

    with pytest.raises(kvote.UnsupportedModelError, match=r"Odd does not run .* \(RuntimeError: odd\)"):
        kvote.Cache(Odd(net.config))
    tiny.feed(net, cache, tiny.ids(1, 5))


@pytest.mark.parametrize("kind", [transformers.LlamaModel, transformers.LlamaForSequenceClassification])
def test_a_model_without_next_tokens_is_refused_by_its_reason(kind):
    config = copy.deepcopy(tiny.model().config)
    with pytest.raises(kvote.UnsupportedModelError, match=f"{kind.__name__} gives no logits of a next token"):
        kvote.Cache(kind(config).eval())


def test_models_of_every_origin_have_a_state():
    net = fresh()
    net.config.labels_of_mine = {1: "a", "b": 2}
    kvote.Cache(net)
    with torch.inference_mode():
        other = type(net)(tiny.model().config).eval()
    kvote.Cache(other)


def test_a_model_whose_positions_are_watched_is_saved_and_each_thread_has_its_own():
    net = build("Qwen2VLForConditionalGeneration")
    tokens = [tiny.ids(1, 6 + i, seed=i) % 50 + 3 for i in range(2)]
    expected = [tiny.feed(net, None, ids) for ids in tokens]
    kvote.Cache(net, "tokenselect")
    pickle.loads(pickle.dumps(net))
    got: dict[int, bool] = {}

    def run(i: int) -> None:
        same = [
            torch.allclose(tiny.feed(net, kvote.Cache(net, "tokenselect"), tokens[i]), expected[i], atol=1e-4)
            for _ in range(15)
        ]
        got[i] = all(same)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {0: True, 1: True}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_training_with_gradient_checkpointing_is_refused():
    net = fresh().train()
    net.gradient_checkpointing_enable()
    with pytest.raises(kvote.InputError, match="gradient checkpointing"):
        kvote.Cache(net)
    kvote.Cache(net.eval())
