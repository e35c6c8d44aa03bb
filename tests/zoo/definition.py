"""StreamingLLM by its definition: the native model on nothing but the sinks and the window.

A test that reads everything cannot see a wrong rotation, because undoing and redoing it cancel. In a model of one layer,
what is cached of a token depends on that token alone, so sinks and window can be fed to the native model as a text of
their own: positions 0 to m - 1, no other token in sight.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import kvote
from zoo.answers import ROUNDING, prompt

SINKS, WINDOW, STEPS = 4, 12, 3
SPEC = f"streamingllm(sinks={SINKS}, window={WINDOW})"


def compare(model: PreTrainedModel) -> str | None:
    """What differs between kvote's StreamingLLM and its definition in a one-layer model; None if nothing does.

    Covers the end of a prompt and the decode steps after it. Raises what kvote or the model raises.
    """
    ids, _ = prompt("plain")
    defined, kept, dense = [], [], []
    texts = [ids]
    for _ in range(STEPS):
        defined.append(_last(model, seen(texts[-1])))
        kept.append(_last(model, texts[-1], **_masked(texts[-1])) if _learns_positions(model) else None)
        dense.append(_last(model, texts[-1]))
        texts.append(torch.cat([texts[-1], defined[-1].argmax(-1, keepdim=True)], dim=1))
    cache = kvote.Cache(model, SPEC)
    fed = 0
    for step in range(STEPS):
        piece = texts[step][:, fed:]
        fed = texts[step].shape[1]
        with torch.no_grad():
            got = model(input_ids=piece, past_key_values=cache, use_cache=True).logits[:, -1].float()
        unit = float(defined[step].abs().max())
        off = _off(got, defined[step], unit)
        if off > ROUNDING and kept[step] is not None:
            off = min(off, _off(got, kept[step], unit))
        if off > ROUNDING:
            far = _off(got, dense[step], unit)
            return f"step {step}: off by {off:.1e} of the largest logit ({far:.1e} from dense attention)"
    if max(_off(a, b, float(a.abs().max())) for a, b in zip(defined, dense, strict=True)) <= ROUNDING:
        return "cannot tell: the definition answers as dense attention does"
    return None


def seen(ids: Tensor) -> Tensor:
    """What StreamingLLM's last query reads."""
    return torch.cat([ids[:, :SINKS], ids[:, -WINDOW:]], dim=1)


def _last(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **kwargs).logits[:, -1].float()


def _off(a: Tensor, b: Tensor, unit: float) -> float:
    return float((a - b).abs().max()) / (unit or 1.0)


def _learns_positions(model: PreTrainedModel) -> bool:
    """Without rotary positions, what a token is at its own position is what was cached: only the mask differs."""
    return not any("rotary" in type(module).__name__.lower() for module in model.modules())


def _masked(ids: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    mask[:, SINKS:-WINDOW] = 0
    return {"attention_mask": mask, "position_ids": torch.arange(ids.shape[1])[None]}
