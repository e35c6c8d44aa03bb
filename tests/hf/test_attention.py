"""Guards of what kvote relies on in transformers (the docstring of kvote/hf), and of what it refuses."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

import kvote
from kvote.hf.facts import find_rope

BROKEN = "transformers {}: {}. kvote/hf relies on it.".format


def broken(what: str) -> str:
    return BROKEN(transformers.__version__, what)


class Spy(CacheLayerMixin):
    """A cache layer that tags the key it returns, and an attention function that notes what reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.updates: list[tuple[Any, ...]] = []

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None: ...

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.updates.append((args, kwargs))
        key = key_states.view_as(key_states)
        key.tag = self
        return key, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def spied(family: str) -> tuple[list[dict[str, Any]], list[Any], torch.Tensor]:
    """What the attention function gets when a model runs on spy layers with spy functions."""
    net, seen = tiny.model(family), []
    mask = torch.empty(0)
    mask.tag = "mask"

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        seen.append({"key": key, "mask": attention_mask, **kwargs})
        return torch.zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register("kvote_test_spy", attend)
    AttentionMaskInterface.register("kvote_test_spy", lambda **kwargs: mask)
    net.set_attn_implementation("kvote_test_spy")
    layers = [Spy(), Spy()]
    with torch.no_grad():
        net(tiny.ids(1, 5), past_key_values=transformers.Cache(layers=layers))
    tiny.model(family)
    return seen, layers, mask


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_registered_attention_function_is_called_by_every_layer(family):
    seen, layers, _ = spied(family)
    assert len(seen) == 2, broken("set_attn_implementation(name) no longer routes layers to a registered function")
    assert all(len(layer.updates) == 1 for layer in layers), broken("layers no longer call cache.update once each")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_attribute_on_the_returned_key_reaches_the_attention_function(family):
    seen, layers, _ = spied(family)
    tags = [getattr(call["key"], "tag", None) for call in seen]
    assert tags == layers, broken("the key tensor returned by cache.update is no longer handed on as it is")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_mask_and_an_attribute_on_it_arrive_unchanged(family):
    seen, _, mask = spied(family)
    assert all(call["mask"] is mask for call in seen), broken("the registered mask no longer arrives unchanged")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_position_ids_arrive(family):
    seen, _, _ = spied(family)
    for call in seen:
        assert call.get("position_ids") is not None, broken("layers no longer pass position_ids to attention")
        assert call["position_ids"].flatten().tolist() == list(range(5)), broken("position_ids no longer count tokens")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_model_file_defines_its_rotation_and_eager_attention(family):
    net = tiny.model(family)
    names = vars(__import__(type(net).__module__, fromlist=["_"]))
    for name in ("apply_rotary_pos_emb", "eager_attention_forward"):
        assert isinstance(names.get(name), Callable), broken(f"{family}'s model file no longer defines {name}")
    assert isinstance(getattr(net.model, "rotary_emb", None), torch.nn.Module), broken("rotary_emb has moved")


def test_the_mask_function_gets_what_kvote_reads():
    seen: list[dict[str, Any]] = []
    AttentionMaskInterface.register("kvote_test_spy", lambda **kwargs: seen.append(kwargs))
    AttentionInterface.register("kvote_test_spy", lambda m, q, k, v, a, **kw: (q.transpose(1, 2), None))
    net = tiny.model()
    net.set_attn_implementation("kvote_test_spy")
    tokens, mask = tiny.padded(2, 6, [2, 0])
    with torch.no_grad():
        net(tokens, attention_mask=mask)
    tiny.model()
    for name in ("attention_mask", "q_length", "q_offset", "mask_function"):
        assert name in seen[0], broken(f"mask functions no longer get {name}")
    assert seen[0]["attention_mask"].shape == (2, 6), broken("the 2-D padding mask no longer reaches mask functions")


def test_layers_of_a_dynamic_cache_tell_full_attention_from_the_rest():
    layers = DynamicCache(config=tiny.model("gemma3").config).layers
    assert [type(layer) for layer in layers] == [DynamicSlidingWindowLayer, DynamicLayer], broken("layer classes")
    kinds = [type(layer).__name__ for layer in tiny.cache(tiny.model("gemma3")).layers]
    assert kinds == ["DynamicSlidingWindowLayer", "CacheLayer"]


OTHER_CACHES: dict[str, Callable[[Any], Any]] = {
    "no cache": lambda net: None,
    "dynamic": lambda net: DynamicCache(config=net.config),
    "static": lambda net: StaticCache(config=net.config, max_cache_len=40),
}


@pytest.mark.parametrize(("family", "native"), [(f, n) for f in tiny.FAMILIES for n in ("sdpa", "eager")])
@pytest.mark.parametrize("other", OTHER_CACHES)
@pytest.mark.parametrize("pads", [None, 0, 5])
def test_a_switched_model_behaves_as_before_with_any_other_cache(family, native, other, pads):
    if (family, native) == ("gpt-oss", "sdpa"):
        pytest.skip("transformers has no sdpa for GPT-OSS")
    tokens, whole = tiny.padded(2, 17, [pads or 0, 0])
    whole = torch.cat([whole, torch.ones(2, 2, dtype=torch.long)], dim=1)
    mask = None if pads is None else whole

    def run(net: Any) -> torch.Tensor:
        cache = OTHER_CACHES[other](net)
        logits = tiny.feed(net, cache, tokens, None if mask is None else mask[:, :17])
        more = [] if cache is None else [tiny.feed(net, cache, tiny.ids(2, 2), mask, 1)]
        return torch.cat([logits, *more], dim=1)

    before = run(tiny.model(family, native=native))
    net = tiny.model(family, native=native)
    kvote.Cache(net)
    assert net.config._attn_implementation.startswith("kvote")
    at = whole[:, : before.shape[1]].bool()
    torch.testing.assert_close(run(net)[at], before[at], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("settings", [{"cache_implementation": "static"}, {}, {"use_cache": False}, {"num_beams": 2}])
@pytest.mark.parametrize("pads", [0, 5])
def test_a_switched_model_generates_as_before_without_a_kvote_cache(family, settings, pads):
    tokens, mask = tiny.padded(2, 17, [pads, 0])
    before = tiny.generate(tiny.model(family), tokens, mask=mask, **settings)
    net = tiny.model(family)
    kvote.Cache(net)
    after = tiny.generate(net, tokens, mask=mask, **settings)
    assert torch.equal(after.sequences, before.sequences)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(after.logits, before.logits, strict=True))


def test_weights_still_train_after_the_switch():
    net = tiny.model(seed=1)
    kvote.Cache(net)
    net(tiny.ids(2, 9), labels=tiny.ids(2, 9)).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())
    net.zero_grad()


def test_a_run_without_kvotes_attention_is_an_error():
    net = tiny.model()
    cache = tiny.cache(net)
    kvote.detach(net)
    with pytest.raises(kvote.InactiveCacheError, match="without kvote's attention"):
        tiny.feed(net, cache, tiny.ids(1, 5))


@pytest.mark.parametrize("ask", [kvote.Cache.report, kvote.Cache.nbytes, lambda cache: cache.layers[0].update(*_kv())])
def test_a_one_layer_model_is_found_out_at_the_latest_when_asked(ask):
    net = tiny.model(num_hidden_layers=1)
    cache = tiny.cache(net)
    kvote.detach(net)
    tiny.feed(net, cache, tiny.ids(1, 5))
    with pytest.raises(kvote.InactiveCacheError):
        ask(cache)


def _kv() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16)


def test_a_cache_that_nothing_went_through_has_nothing_to_report():
    with pytest.raises(kvote.InactiveCacheError, match="no token"):
        tiny.cache(tiny.model()).report()


def tiny_t5() -> Any:
    config = transformers.T5Config(vocab_size=tiny.VOCABULARY, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def tiny_bloom() -> Any:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, n_layer=1, n_head=2)
    )


def tiny_gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=16, n_layer=1, n_head=2)
    )


def all_sliding() -> Any:
    return tiny.model("mistral", sliding_window=8)


@pytest.mark.parametrize(
    ("build", "method", "message"),
    [
        (tiny_t5, "dense", "T5ForConditionalGeneration is an encoder-decoder"),
        (tiny_bloom, "dense", "BloomForCausalLM"),
        (all_sliding, "dense", "MistralForCausalLM has no full-attention layer"),
    ],
)
def test_models_that_cannot_be_managed_are_refused_by_name(build, method, message):
    net = build()
    before = net.config._attn_implementation
    with pytest.raises(kvote.UnsupportedModelError, match=message):
        kvote.Cache(net, method)
    assert net.config._attn_implementation == before


def test_a_model_without_rotary_positions_runs_dense():
    net = tiny_gpt2().eval()
    tokens = tiny.ids(2, 9)
    before = tiny.feed(net, None, tokens)
    torch.testing.assert_close(tiny.feed(net, tiny.cache(net), tokens, passes=4), before, atol=1e-5, rtol=1e-5)


def test_a_custom_4d_mask_is_refused_by_name():
    net = tiny.model()
    cache = tiny.cache(net)
    with pytest.raises(kvote.UnsupportedModelError, match=r"LlamaAttention.*custom attention mask"), torch.no_grad():
        net(tiny.ids(1, 4), past_key_values=cache, attention_mask=torch.zeros(1, 1, 4, 4))


def test_a_mask_that_does_not_cover_the_cache_is_refused():
    net = tiny.model()
    cache = tiny.cache(net)
    tiny.feed(net, cache, tiny.ids(1, 6))
    with pytest.raises(kvote.InputError, match=r"covers 2 tokens.*holds 6 and 2 are new"), torch.no_grad():
        net(tiny.ids(1, 2), past_key_values=cache, attention_mask=torch.ones(1, 2, dtype=torch.long))


def test_another_batch_size_is_refused():
    net = tiny.model()
    cache = tiny.cache(net)
    tiny.feed(net, cache, tiny.ids(2, 6))
    with pytest.raises(kvote.InputError, match="holds 2 sequences, but the batch has 3"):
        tiny.feed(net, cache, tiny.ids(3, 1))


class LargestTensor(TorchDispatchMode):
    """Notes the largest storage that any operator returns, in entries."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.entries = max(self.entries, size)
        return made


@pytest.mark.parametrize("pads", [0, 100])
@pytest.mark.parametrize(
    "method",
    [
        "dense",
        "streamingllm(sinks=4, window=124)",
        "tokenselect(top_k=64, sinks=4, window=60, chunk=64)",
        "random(top_k=64, sinks=4, window=60, chunk=64)",
    ],
)
def test_no_tensor_of_a_prefill_grows_with_the_square_of_its_length(method, pads):
    n = 4096
    net = tiny.model(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    cache = tiny.cache(net, method)
    tokens, mask = tiny.padded(1, n, [pads])
    with LargestTensor() as largest, torch.no_grad():
        net(tokens, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    assert 32 * n <= largest.entries < n * n / 8


def test_memory_of_a_long_first_pass_is_measured_by_the_guard():
    with LargestTensor() as largest:
        torch.zeros(100, 4) @ torch.zeros(4, 100)
    assert largest.entries == 10_000


def test_a_shared_rotary_module_is_not_copied_with_the_cache():
    net = tiny.model()
    cache = tiny.cache(net, "tokenselect")
    assert copy.deepcopy(cache).managed[0].rope is cache.managed[0].rope
    assert find_rope(net, 0).module is not None
