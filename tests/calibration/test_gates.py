"""DuoAttention's training of head gates (arXiv 2410.10819)."""

import itertools

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from transformers import DynamicCache

from kvote import InputError, UnsupportedModelError
from kvote.calibration import gates as training
from kvote.calibration.gates import Example, distance, rate, streaming_mask, train_duo
from kvote.calibration.heads import DUO, scores_of

SINKS, WINDOW = 2, 6


def example(columns: int = 40, seed: int = 0) -> Example:
    labels = torch.zeros(columns, dtype=torch.bool)
    labels[-8:] = True
    return Example(tiny.ids(1, columns, seed), labels)


def streaming(tokens: int, window: int = WINDOW) -> Tensor:
    return streaming_mask(tokens, SINKS, window, torch.device("cpu"))


def written_out(net, ids: Tensor, gates: Tensor) -> Tensor:
    """Final hidden states of a Llama with gates [layers, h], from its weights, layer by layer."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, t = net.model, ids.shape[1]
    streams = [model.embed_tokens(ids), model.embed_tokens(ids)]
    angles = model.rotary_emb(streams[0], torch.arange(t)[None])
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    at = torch.arange(t)
    streaming = causal & ((at[None] < SINKS) | (at[:, None] - at[None] < WINDOW))
    for layer, gate in zip(model.layers, gates, strict=True):
        answers = []
        for hidden, mask in zip(streams, (causal, streaming), strict=True):
            attention, x = layer.self_attn, layer.input_layernorm(hidden)
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            q, k, v = (p(x).view(1, t, -1, attention.head_dim).transpose(1, 2) for p in parts)
            q, k = apply_rotary_pos_emb(q, k, *angles)
            k, v = (y.repeat_interleave(q.shape[1] // k.shape[1], 1) for y in (k, v))
            logits = (q @ k.mT * attention.scaling).masked_fill(~mask, float("-inf"))
            answers.append((logits.softmax(-1) @ v).transpose(1, 2))
        # Full attention is that of the stream that sees everything, as in the published code.
        open_ = gate.repeat_interleave(answers[0].shape[2] // len(gate))[:, None]
        answers[1] = (1 - open_) * answers[1] + open_ * answers[0]
        for i, answer in enumerate(answers):
            hidden = streams[i] + layer.self_attn.o_proj(answer.reshape(1, t, -1))
            streams[i] = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return (model.norm(streams[0]) - model.norm(streams[1]))[0]


@pytest.fixture
def attached():
    net = tiny.model()
    training.attach(net)
    return net


@pytest.mark.parametrize("seed", [0, 1])
def test_the_distance_and_its_gradient_are_those_of_two_streams_written_out(attached, seed):
    torch.manual_seed(seed)
    gates = torch.rand(2, 2, requires_grad=True)
    text = example()
    mine = distance(attached, gates, [0, 1], text, streaming(40))
    with torch.enable_grad():
        expected = written_out(attached, text.ids, gates)[text.labels].square().mean()
    torch.testing.assert_close(mine, expected, atol=1e-6, rtol=1e-4)
    assert float(mine.detach()) > 0
    for got, due in zip(torch.autograd.grad(mine, gates), torch.autograd.grad(expected, gates), strict=True):
        torch.testing.assert_close(got, due, atol=1e-6, rtol=1e-3)


@torch.no_grad()
def test_with_all_gates_open_nothing_differs(attached):
    assert float(distance(attached, torch.ones(2, 2), [0, 1], example(), streaming(40))) < 1e-12
    assert float(distance(attached, torch.zeros(2, 2), [0, 1], example(), streaming(40, 100))) < 1e-12
    assert float(distance(attached, torch.zeros(2, 2), [0, 1], example(), streaming(40))) > 1e-3


@torch.no_grad()
def test_only_labelled_tokens_count(attached):
    text = example()
    early = Example(text.ids, torch.arange(40) < SINKS + WINDOW)
    # These see everything through sinks and window.
    assert float(distance(attached, torch.zeros(2, 2), [0, 1], early, streaming(40))) < 1e-12


@pytest.mark.parametrize("rows", [1, 4, 256])
def test_the_mask_of_streaming_heads(monkeypatch, rows):
    monkeypatch.setattr(training, "_MASK_ROWS", rows)
    mask = streaming_mask(9, 2, 3, torch.device("cpu"))
    for query, token in itertools.product(range(9), range(9)):
        assert bool(mask[query, token]) == (token <= query and (token < 2 or query - token < 3))


def test_a_mask_is_made_once_for_texts_of_one_length(monkeypatch):
    made = []
    make = training.streaming_mask
    monkeypatch.setattr(training, "streaming_mask", lambda tokens, *rest: (made.append(tokens), make(tokens, *rest))[1])
    train_duo(tiny.model(), [example(columns) for columns in (40, 40, 30, 30, 40)], 5, SINKS, WINDOW)
    assert made == [40, 30, 40]


@pytest.mark.parametrize("steps", [1, 4, 10, 2000])
def test_the_rate_rises_and_falls_over_a_fifth_each(steps):
    rates = [rate(step, steps) for step in range(steps)]
    fifth = steps // 5
    assert max(rates) == 1.0 or steps < 5
    assert all(0.1 <= each <= 1 for each in rates)
    if fifth > 1:
        assert rates[0] == pytest.approx(max(1 / fifth, 0.1))
        assert rates[-1] == pytest.approx(max(1 / fifth, 0.1))
        assert set(rates[fifth : steps - fifth]) == {1.0}
        assert rates[: fifth + 1] == sorted(rates[: fifth + 1])


def copier():
    """A model in which one key head alone looks far back: it copies what followed the same token before.

    Every layer but the first has random weights, scaled down; in layer 1, query and value of key head 0 read the
    token itself, at no rotation to speak of, and the output adds it loudly.
    """
    changes = {"num_hidden_layers": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e12}}
    net = tiny.model(**changes)
    net = type(net)(net.config)
    torch.manual_seed(0)
    dim, width = 16, 64
    for layer in net.model.layers:
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.weight.data *= 0.02
    attention = net.model.layers[1].self_attn
    # Only the slowest half of the channels, which hardly turn, tells tokens apart.
    look = torch.zeros(dim, width)
    slow = [*range(4, 8), *range(12, 16)]
    look[slow] = torch.randn(8, width)
    for head in range(2):
        attention.q_proj.weight.data[head * dim : (head + 1) * dim] = 4 * look
    attention.k_proj.weight.data[:dim] = look
    attention.v_proj.weight.data[:dim] = torch.randn(dim, width)
    attention.o_proj.weight.data[:, : 2 * dim] = torch.randn(width, 2 * dim)
    return net.eval()


def copies(seed: int) -> Example:
    """Distinct tokens, and some of the first again at the end."""
    ids = tiny.ids(1, 60, seed)
    ids[:, -10:] = ids[:, 10:20]
    return Example(ids, torch.arange(60) >= 50)


def test_a_planted_copy_head_stays_open_and_the_others_close():
    net = copier()
    steps = 150
    made = train_duo(net, map(copies, itertools.count()), steps, SINKS, WINDOW)
    gates = scores_of(made, DUO)["gate"]
    planted = gates[1][0]
    others = [*gates[0], gates[1][1]]
    assert planted > 0.5
    assert max(others) < 0.1
    # At the same sparsity, any other head kept in its place changes what the model answers far more.
    training.attach(net)
    errors = []
    for kept in range(4):
        choice = torch.zeros(4)
        choice[kept] = 1
        with torch.no_grad():
            texts = [copies(10_000 + i) for i in range(5)]
            each = [distance(net, choice.reshape(2, 2), [0, 1], text, streaming(60)) for text in texts]
        errors.append(float(torch.stack(each).mean()))
    assert 5 * errors[2] < min(errors[:2] + errors[3:])


def test_the_model_is_as_before_afterwards():
    net = tiny.model()
    net = type(net)(net.config)
    net.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    net.train()
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    told = []
    with torch.no_grad():
        train_duo(net, [example(seed=i) for i in range(3)], 3, SINKS, WINDOW, lambda step, loss: told.append(step))
    assert told == [1, 2, 3]
    assert net.training
    assert net.config._attn_implementation == "sdpa"
    frozen = [name for name, weight in net.named_parameters() if not weight.requires_grad]
    assert frozen == ["model.layers.0.mlp.up_proj.weight"]
    assert all(weight.grad is None for weight in net.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in net.state_dict().items())
    net.eval()
    assert tiny.feed(net, DynamicCache(), tiny.ids(1, 5)).isfinite().all()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral", "phi3", "gemma3", "olmo2", "cohere"])
def test_models_of_other_families_are_trained(family):
    net = tiny.model(family)
    made = train_duo(net, [example(seed=i) for i in range(10)], 10, SINKS, WINDOW)
    assert list(scores_of(made, DUO)["gate"]) == ([1] if family == "gemma3" else [0, 1])
    assert made.data["steps"] == 10
    assert made.data["tokens"] == 400


def test_gates_move_by_the_rate_and_stay_within_their_bounds():
    net = tiny.model()
    text = [Example(tiny.ids(1, 12), torch.ones(12, dtype=torch.bool))] * 300
    # Everything is seen: nothing but the penalty moves the gates.
    made = train_duo(net, [example(), *text], 120, SINKS, 12)
    assert {gate for heads in scores_of(made, DUO)["gate"].values() for gate in heads} == {0.0}
    few = train_duo(net, [example(), *text], 10, SINKS, 12)
    moved = sum(rate(step, 10) for step in range(10)) * training.RATE
    assert np.allclose([gate for heads in scores_of(few, DUO)["gate"].values() for gate in heads], 1 - moved, atol=0.03)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(InputError, match="3 steps need as many texts; there are 2"):
        train_duo(tiny.model(), [example(), example()], 3, SINKS, WINDOW)
    with pytest.raises(InputError, match="No text is longer than the 40 tokens that streaming heads see"):
        train_duo(tiny.model(), [example()], 1, 30, 10)
    with pytest.raises(UnsupportedModelError, match="soft cap or learned sink logits"):
        train_duo(tiny.model("gpt-oss"), [example()], 1, SINKS, WINDOW)
