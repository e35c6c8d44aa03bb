"""Rotary positions: undone exactly, redone anywhere, for every kind of rotary module."""

import inspect
import sys
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from kvote import UnsupportedModelError
from kvote.hf.facts import find_rope

KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def of_kind(kind: str) -> Any:
    return tiny.model("llama", rope_parameters={"rope_theta": 10_000.0, **KINDS[kind]})


def model_rotation(net: Any, x: Tensor, positions: Tensor, layer: int = 1) -> Tensor:
    """What the model itself does to keys [1, h, n, d]."""
    apply = sys.modules[type(net).__module__].apply_rotary_pos_emb
    typed = "layer_type" in inspect.signature(net.model.rotary_emb.forward).parameters
    kind = {"layer_type": net.config.layer_types[layer]} if typed else {}
    return apply(x, x, *net.model.rotary_emb(x, positions, **kind))[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_models_rotation_is_undone(family, dtype):
    net = tiny.model(family)
    rope, x = find_rope(net, 1), torch.randn(1, 2, 50, 16)
    positions = torch.arange(950, 1000)[None]
    rotated = model_rotation(net, x.to(dtype), positions)
    back = rope.undo(rotated, rope.angles(positions, dtype))
    rounding = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(back.float(), x, atol=rounding, rtol=rounding)
    assert (rotated.float() - x).norm() > 1


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_contiguous_positions_are_those_of_the_model(family):
    net = tiny.model(family)
    rope, x = find_rope(net, 1), torch.randn(1, 2, 50, 16)
    mine = rope.apply(x, rope.contiguous(50, x.device))
    torch.testing.assert_close(mine, model_rotation(net, x, torch.arange(50)[None]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_scaling_is_undone_and_redone(kind):
    net = of_kind(kind)
    rope, x = find_rope(net, 0), torch.randn(1, 2, 50, 16)
    for start in (0, 300):
        positions = torch.arange(start, start + 50)[None]
        rotated = model_rotation(net, x, positions, 0)
        torch.testing.assert_close(rope.undo(rotated, rope.angles(positions, x.dtype)), x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["tokenselect(top_k=300)", "streamingllm(sinks=4, window=300)"])
def test_every_kind_of_scaling_reads_a_whole_text_as_the_model_does(kind, method):
    tokens = tiny.ids(1, 40)
    net = of_kind(kind)
    expected = tiny.feed(net, None, tokens)
    torch.testing.assert_close(tiny.feed(net, tiny.cache(net, method), tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sliding_window_does_not_depend_on_passes_under_any_scaling(kind):
    tokens = tiny.ids(1, 90)
    net = of_kind(kind)
    method = "streamingllm(sinks=2, window=40)"
    whole = tiny.feed(net, tiny.cache(net, method), tokens)
    torch.testing.assert_close(tiny.feed(net, tiny.cache(net, method), tokens, passes=1), whole, atol=1e-4, rtol=1e-4)


def test_half_a_rotation_leaves_the_other_channels():
    net = tiny.model("phi3-partial")
    rope, x = find_rope(net, 0), torch.randn(1, 2, 5, 16)
    rotated = rope.apply(x, rope.contiguous(5, x.device))
    assert torch.equal(rotated[..., 8:], x[..., 8:])
    assert not torch.allclose(rotated[..., 1:, :8], x[..., 1:, :8])


def test_a_shorter_table_after_a_longer_one_is_the_short_one():
    rope = find_rope(of_kind("longrope"), 0)
    short = rope.contiguous(30, torch.device("cpu"))[0].clone()
    rope.contiguous(200, torch.device("cpu"))
    assert torch.equal(rope.contiguous(30, torch.device("cpu"))[0], short)
    assert not torch.allclose(rope.contiguous(200, torch.device("cpu"))[0][:30], short)


def test_tables_kept_are_few():
    rope = find_rope(tiny.model(), 0)
    for count in range(1, 60):
        rope.contiguous(count, torch.device("cpu"))
    assert len(rope._tables) <= 8


def test_a_rotation_that_is_not_one_is_refused(monkeypatch):
    net = tiny.model(seed=7)
    modeling = sys.modules[type(net).__module__]
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos[:, None], k * cos[:, None]))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM rotates keys in a way that kvote cannot undo"):
        find_rope(net, 0)
