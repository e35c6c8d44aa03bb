"""StreamingLLM by its definition: the native model on nothing but the sinks and the window.

A test that reads everything cannot see a wrong rotation, because undoing and redoing it cancel. In a model of one
layer, what is cached of a token depends on that token alone, so sinks and window can be fed to the native model as a
text of their own: positions 0 to m - 1, no other token in sight.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zoo.answers import ROUNDING, largest, prompt, tried

SINKS, WINDOW, STEPS = 4, 12, 3
SPEC = f"streamingllm(sinks={SINKS}, window={WINDOW})"


@dataclass(frozen=True)
class Expected:
    """Per step: the text so far [1, n] and the last token's logits [1, vocabulary], by the definition and densely.

    ``kept``: the same by a mask, every token at its own position (counted by the model, or from 0); none where
    positions are rotary.
    """

    texts: list[Tensor]
    defined: list[Tensor]
    kept: list[list[Tensor]]
    dense: list[Tensor]


def expected(model: PreTrainedModel) -> Expected:
    """What the native model says of sinks and window alone. Raises what the model raises."""
    ids, _ = prompt("plain")
    steps = Expected([], [], [], [])
    for _ in range(STEPS):
        steps.texts.append(ids)
        steps.defined.append(_last(model, seen(ids)))
        steps.kept.append([] if _rotates(model) else _masked(model, ids))
        steps.dense.append(_last(model, ids))
        ids = torch.cat([ids, steps.defined[-1].argmax(-1, keepdim=True)], dim=1)
    return steps


def compare(model: PreTrainedModel, cache: Any, steps: Expected) -> str | None:
    """What differs between kvote's StreamingLLM and its definition in a one-layer model; None if nothing does.

    Covers the end of a prompt and the decode steps after it. Raises what kvote or the model raises.
    """
    fed, tells = 0, False
    for step, text in enumerate(steps.texts):
        defined, kept, dense = steps.defined[step], steps.kept[step], steps.dense[step]
        unit = largest(defined)
        with torch.no_grad():
            out = model(input_ids=text[:, fed:], past_key_values=cache, use_cache=True)
        got, fed = out.logits[:, -1].float(), text.shape[1]
        off = min(_off(got, each) for each in (defined, *kept)) / unit
        if not off <= ROUNDING:
            far = _off(got, dense) / unit
            return f"step {step}: off by {off:.1e} of the largest logit ({far:.1e} from dense attention)"
        tells |= _off(defined, dense) / unit > ROUNDING
    return None if tells else "cannot tell: the definition answers as dense attention does"


def seen(ids: Tensor) -> Tensor:
    """What StreamingLLM's last query reads."""
    return torch.cat([ids[:, :SINKS], ids[:, -WINDOW:]], dim=1)


def _last(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **kwargs).logits[:, -1].float()


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _rotates(model: PreTrainedModel) -> bool:
    """Without rotary positions, what a token is at its own position is what was cached: only the mask differs."""
    return any("rotary" in type(module).__name__.lower() for module in model.modules())


def _masked(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    mask = torch.ones_like(ids)
    mask[:, SINKS:-WINDOW] = 0
    places = {"position_ids": torch.arange(ids.shape[1])[None]}
    found = [tried(lambda more=more: _last(model, ids, attention_mask=mask, **more)) for more in ({}, places)]
    return [logits for logits, error in found if error is None]
