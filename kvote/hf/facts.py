"""What is known about a model: the trial's outcome, kept until the model changes."""

import json
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from kvote.errors import UnsupportedModelError
from kvote.hf import switch
from kvote.hf.guard import guard, unguard
from kvote.hf.trial import Facts, LayerFacts, find_out
from kvote.rope import Rope

_known: "WeakKeyDictionary[torch.nn.Module, tuple[Any, Facts | UnsupportedModelError]]" = WeakKeyDictionary()


def facts_of(model: PreTrainedModel) -> Facts:
    """The trial's outcome, and the model switched to kvote's attention. The trial runs once per model, and anew after
    its weights, adapters or config have changed.

    Raises UnsupportedModelError as the trial.
    """
    state = _state(model)
    known = _known.get(model)
    if known is None or known[0] != state or (isinstance(known[1], Facts) and not switch.is_attached(model)):
        outcome: Facts | UnsupportedModelError
        try:
            outcome = find_out(model)
        except UnsupportedModelError as error:
            # Without its frames, which would keep the trial's tensors.
            outcome = UnsupportedModelError(*error.args)
            _known[model] = state, outcome
            raise
        if outcome.throws_away is not None:
            guard(model, outcome.throws_away)
        _known[model] = known = state, outcome
    if isinstance(known[1], UnsupportedModelError):
        raise UnsupportedModelError(*known[1].args)
    return known[1]


def detach(model: PreTrainedModel) -> None:
    """Gives ``model`` back as it was before the first ``kvote.Cache``: with its own attention, and unwatched.

    A kvote cache that is still used with it raises InactiveCacheError; a new one switches the model again.
    """
    switch.detach(model)
    unguard(model)
    known = _known.pop(model, None)
    if known is not None and isinstance(known[1], Facts):
        for layer in known[1].layers.values():
            if layer.rotary is not None:
                layer.rotary.release()


def find_rope(model: PreTrainedModel, layer: int) -> Rope:
    """The rotary embedding of a layer. Raises UnsupportedModelError with the reason if it cannot be undone."""
    return ropes_of({layer: facts_of(model).layers[layer]})[layer]


def ropes_of(layers: dict[int, LayerFacts]) -> dict[int, Rope]:
    """The ropes of ``layers`` for one cache; layers that rotate alike share one, and with it what it remembers.

    Raises UnsupportedModelError with the reason if the model's rotation cannot be undone.
    """
    own: dict[int, Rope] = {}
    for layer in layers.values():
        if layer.rope is None:
            raise UnsupportedModelError(layer.why_no_rope)
        own.setdefault(id(layer.rope), layer.rope.anew())
    return {index: own[id(layer.rope)] for index, layer in layers.items()}


def _state(model: PreTrainedModel) -> Any:
    """Changes with what a trial depends on: weights, adapters, config."""
    weights = tuple((id(p), p._version) for p in model.parameters())
    # What is written through ``.data`` changes no version.
    corners = [p.detach()[(at,) * p.dim()].float().cpu() for p in model.parameters() if _readable(p) for at in (0, -1)]
    sample = torch.stack(corners).numpy().tobytes() if corners else b""
    adapters = tuple(
        (str(module.active_adapter), bool(getattr(module, "merged", False)), bool(module.disable_adapters))
        for module in model.modules()
        if hasattr(module, "active_adapter") and hasattr(module, "disable_adapters")
    )
    return weights, sample, adapters, json.dumps(model.config.to_dict(), sort_keys=True, default=str)


def _readable(weight: torch.Tensor) -> bool:
    """Whether a weight is a plain tensor that holds numbers: no meta tensor, and none of a quantiser's own types."""
    return type(weight.data) is torch.Tensor and not weight.is_meta and weight.numel() > 0
