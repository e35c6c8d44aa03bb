"""Several caches in one batch: each row gets what it would have had alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import kvote
from kvote.layer import Layer

FEW = "top_k=5, sinks=2, window=6"
METHODS = {
    "dense": "dense",
    "tokenselect": f"tokenselect({FEW}, chunk=1, tail=2, theta=0.5)",
    "snapkv | kivi": "snapkv(budget=24, window=6) | kivi(residual=32)",
    "h2o": "h2o(budget=20)",
}
PROMPTS = {"dense": 37, "tokenselect": 90, "snapkv | kivi": 61, "h2o": 50}


def prompt(name: str) -> Tensor:
    return tiny.ids(1, PROMPTS[name], seed=len(name))


def read(net: Any, name: str) -> tuple[kvote.Cache, int]:
    """A cache that has read its prompt, and the first token of the answer."""
    cache = kvote.Cache(net, METHODS[name])
    return cache, int(tiny.feed(net, cache, prompt(name))[0, -1].argmax())


def alone(net: Any, name: str, steps: int) -> list[int]:
    cache, token = read(net, name)
    tokens = [token]
    for _ in range(steps):
        tokens.append(int(tiny.feed(net, cache, torch.tensor([[tokens[-1]]]))[0, -1].argmax()))
    return tokens


@torch.no_grad()
def step(net: Any, rows: kvote.Rows, answers: list[list[int]]) -> None:
    """Each row goes on with the last token of its answer."""
    logits = net(**rows.inputs([answer[-1:] for answer in answers])).logits
    for answer, own in zip(answers, logits, strict=True):
        answer.append(int(own[-1].argmax()))


@contextmanager
def forwards(net: Any) -> Iterator[list[int]]:
    """How many rows each forward pass had."""
    counted: list[int] = []
    handle = net.register_forward_pre_hook(
        lambda module, args, kwargs: counted.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        yield counted
    finally:
        handle.remove()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_caches_that_join_and_leave_get_what_they_would_have_had_alone(family):
    net = tiny.model(family)
    (a, one), (b, two), (c, three), (late, four) = (read(net, name) for name in METHODS)
    first, second, third, fourth = [one], [two], [three], [four]
    rows = kvote.Rows(net)
    assert [rows.join(cache) for cache in (a, b, c)] == [0, 1, 2]
    with forwards(net) as counted:
        for _ in range(4):
            step(net, rows, [first, second, third])
    assert counted == [3] * 4
    assert rows.leave(b) is b
    for _ in range(2):
        second.append(int(tiny.feed(net, b, torch.tensor([second[-1:]]))[0, -1].argmax()))
        step(net, rows, [first, third])
    rows.join(late)
    for _ in range(4):
        step(net, rows, [first, third, fourth])
    rows.leave(a)
    rows.join(b)
    for _ in range(3):
        step(net, rows, [third, fourth, second])
    for name, answer in zip(METHODS, (first, second, third, fourth), strict=True):
        assert answer == alone(net, name, len(answer) - 1)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prompt_comes_in_chunks_beside_rows_that_generate(family):
    net = tiny.model(family)
    (a, one), (b, two) = read(net, "dense"), read(net, "tokenselect")
    first, second = [one], [two]
    rows, new = kvote.Rows(net), kvote.Cache(net, METHODS["snapkv | kivi"])
    text = prompt("snapkv | kivi")[0]
    for cache in (a, b, new):
        rows.join(cache)
    new.expect(len(text))
    with torch.no_grad():
        for chunk in text.split(20):
            logits = net(**rows.inputs([first[-1:], second[-1:], chunk])).logits
            first.append(int(logits[0, -1].argmax()))
            second.append(int(logits[1, -1].argmax()))
    third = [int(logits[2, -1].argmax())]
    for _ in range(4):
        step(net, rows, [first, second, third])
    assert first == alone(net, "dense", len(first) - 1)
    assert second == alone(net, "tokenselect", len(second) - 1)
    whole = kvote.Cache(net, METHODS["snapkv | kivi"])
    whole.expect(len(text))
    tokens = [int(tiny.feed(net, whole, text[None], passes=20)[0, -1].argmax())]
    for _ in range(4):
        tokens.append(int(tiny.feed(net, whole, torch.tensor([tokens[-1:]]))[0, -1].argmax()))
    assert third == tokens


def test_padding_may_stand_behind_and_rows_may_sit_out():
    net = tiny.model()
    (a, _), (b, _) = read(net, "dense"), read(net, "tokenselect")
    rows = kvote.Rows(net)
    rows.join(a)
    rows.join(b)
    tokens = tiny.ids(1, 3, seed=5)
    places = PROMPTS["dense"] + torch.arange(3)
    with torch.no_grad():
        got = net(
            input_ids=tokens.expand(2, -1),
            attention_mask=torch.tensor([[1, 1, 0], [0, 0, 0]]),
            position_ids=torch.stack([places, 0 * places]),
            past_key_values=rows,
        ).logits
    torch.testing.assert_close(got[0, :2], tiny.feed(net, read(net, "dense")[0], tokens[:, :2])[0], atol=1e-4, rtol=0)
    assert [cache.get_seq_length() for cache in rows.caches] == [PROMPTS["dense"] + 2, PROMPTS["tokenselect"]]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_interrupted_layer_changes_no_row(family):
    net = tiny.model(family)
    (a, one), (b, two) = read(net, "dense"), read(net, "h2o")
    rows = kvote.Rows(net)
    rows.join(a)
    rows.join(b)
    run, calls = Layer.run, []

    def fails(self: Layer, given: Any) -> Tensor:
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self, given)

    before = [cache.managed[0].held for cache in (a, b)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layer, "run", fails)
        with pytest.raises(KeyboardInterrupt):
            step(net, rows, [[one], [two]])
    assert [cache.managed[0].held for cache in (a, b)] == before
    if family == "gemma3":
        # Its sliding layer comes first and has gone through the pass.
        with pytest.raises(kvote.InterruptedPassError, match="Row 0: The last pass was interrupted"):
            step(net, rows, [[one], [two]])
        for cache in rows.caches:
            cache.reset()
        return
    first, second = [one], [two]
    step(net, rows, [first, second])
    assert first == alone(net, "dense", 1)
    assert second == alone(net, "h2o", 1)


def test_a_pass_interrupted_between_layers_is_refused_until_every_row_is_cropped():
    net = tiny.model()
    (a, one), (b, two) = read(net, "dense"), read(net, "tokenselect")
    rows = kvote.Rows(net)
    rows.join(a)
    rows.join(b)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = net.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        step(net, rows, [[one], [two]])
    handle.remove()
    with pytest.raises(kvote.InterruptedPassError, match=r"Row 0: .*cache\.crop\(-1\)"):
        step(net, rows, [[one], [two]])
    for cache in rows.caches:
        cache.crop(-1)
    first, second = [one], [two]
    step(net, rows, [first, second])
    assert first == alone(net, "dense", 1)
    assert second == alone(net, "tokenselect", 1)


def test_what_cannot_join_is_refused():
    net = tiny.model()
    rows, cache = kvote.Rows(net), read(net, "dense")[0]
    with pytest.raises(kvote.InputError, match="No cache has joined"), torch.no_grad():
        net(input_ids=tiny.ids(1, 1), past_key_values=rows)
    rows.join(cache)
    with pytest.raises(kvote.InputError, match="joined a batch already"):
        kvote.Rows(net).join(cache)
    two = kvote.Cache(net)
    tiny.feed(net, two, tiny.ids(2, 5))
    with pytest.raises(kvote.InputError, match="this one holds 2"):
        rows.join(two)
    with pytest.raises(kvote.InputError, match="other layers"):
        rows.join(kvote.Cache(tiny.model("gemma3")))
    with pytest.raises(kvote.InputError, match=r"A kvote\.Cache can join"):
        rows.join("dense")
    with pytest.raises(kvote.InputError, match="has not joined"):
        rows.leave(two)


def test_what_a_batch_cannot_tell_is_refused():
    net = tiny.model()
    rows = kvote.Rows(net)
    for name in ("dense", "tokenselect"):
        rows.join(read(net, name)[0])
    with torch.no_grad():
        with pytest.raises(kvote.InputError, match="pass position_ids"):
            net(input_ids=tiny.ids(2, 1), past_key_values=rows)
        with pytest.raises(kvote.InputError, match="the batch has 3 rows"):
            net(input_ids=tiny.ids(3, 1), past_key_values=rows, position_ids=torch.zeros(3, 1, dtype=torch.long))
        with pytest.raises(kvote.InputError, match="which of the 1 new columns"):
            net(**{**rows.inputs([[5], [6]]), "attention_mask": torch.ones(2, 38, dtype=torch.long)})
    with pytest.raises(kvote.InputError, match="tokens of 1 rows"):
        rows.inputs([[5]])


def test_a_cache_whose_rows_are_gone_can_join_anew():
    net = tiny.model()
    cache = read(net, "dense")[0]
    kvote.Rows(net).join(cache)
    kvote.Rows(net).join(cache)


def test_a_model_with_recurrent_layers_is_refused_by_name():
    config = AutoConfig.for_model(
        "qwen3_next",
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    net = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(kvote.UnsupportedModelError, match="Qwen3NextForCausalLM has layers of the kind Linear"):
        kvote.Rows(net)
