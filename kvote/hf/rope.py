"""Which rotary embedding a layer uses, found out by trying."""

import copy
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvote.errors import UnsupportedModelError
from kvote.kernels import rotate
from kvote.rope import Rope


def find_ropes(model: PreTrainedModel, layers: list[int]) -> dict[int, Rope]:
    """The rotary embedding of each of ``layers``; those of one type share it. Raises UnsupportedModelError."""
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    shared: dict[str, Rope] = {}
    for index in layers:
        if types[index] not in shared:
            shared[types[index]] = find_rope(model, index)
    return {index: shared[types[index]] for index in layers}


def find_rope(model: PreTrainedModel, layer_index: int) -> Rope:
    """The rotary embedding of a layer, proven on random numbers to be undone. Raises UnsupportedModelError."""
    name = type(model).__name__
    rotary = next(
        (m.rotary_emb for m in model.modules() if isinstance(getattr(m, "rotary_emb", None), torch.nn.Module)), None
    )
    modeling = sys.modules[type(model).__module__]
    apply = getattr(modeling, "apply_rotary_pos_emb", None)
    if rotary is None or apply is None:
        raise UnsupportedModelError(f"{name} has no rotary positions that kvote can undo; use method 'dense'.")
    config = model.config.get_text_config(decoder=True)
    module = _rotary_call(rotary, config, layer_index)
    fresh = still = None
    if any(kind in str(getattr(rotary, "rope_type", "")) for kind in ("longrope", "dynamic")):
        fresh = partial(_fresh_rotary_call, rotary, config, layer_index)
        # Below the decorator that chooses frequencies by the largest position.
        still = _rotary_call(rotary, config, layer_index, partial(inspect.unwrap(type(rotary).forward), rotary))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions = torch.tensor([[3, 5, 8, 1]], device=model.device)
    x = torch.randn(1, 1, 4, head_dim, device=model.device, generator=torch.Generator(model.device).manual_seed(0))
    cos, sin = module(positions, torch.float32)
    if cos.dim() != 3 or 2 * cos.shape[-1] < 2:
        raise UnsupportedModelError(f"{name} uses rotary positions of a form that kvote does not know; use 'dense'.")
    expected = apply(x, x, cos, sin)[0]
    for interleaved, repeated in ((False, True), (True, True), (False, False)):
        rope = Rope(module, interleaved, repeated, fresh, still)
        angles = rope.angles(positions, torch.float32)
        if 2 * angles[0].shape[-1] <= head_dim:
            mine = rotate(x, angles[0][:, None], angles[1][:, None], interleaved=interleaved)
            if torch.allclose(mine, expected, atol=1e-5) and torch.allclose(rope.undo(mine, angles), x, atol=1e-4):
                return rope
    raise UnsupportedModelError(f"{name} rotates keys in a way that kvote cannot undo; use method 'dense'.")


def _rotary_call(
    rotary: torch.nn.Module, config: Any, layer_index: int, call: Callable[..., Any] | None = None
) -> Callable[[Tensor, torch.dtype], Any]:
    """``call`` instead of the module itself, if given."""
    call = rotary if call is None else call
    typed = "layer_type" in inspect.signature(rotary.forward).parameters
    kwargs = {"layer_type": config.layer_types[layer_index]} if typed else {}

    def angles(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return call(torch.empty(0, dtype=dtype, device=positions.device), positions, **kwargs)

    return angles


def _fresh_rotary_call(rotary: torch.nn.Module, config: Any, layer_index: int) -> Callable[[Tensor, torch.dtype], Any]:
    """The same for a copy of the module without the state that the texts read so far have left in it."""
    clone: Any = copy.deepcopy(rotary)
    if hasattr(clone, "original_inv_freq"):
        clone.inv_freq = clone.original_inv_freq.clone()
        clone.max_seq_len_cached = clone.original_max_seq_len
    return _rotary_call(clone, config, layer_index)
