"""Facts about a model: the outcome of its trial, kept until the model changes."""

import threading
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from kvote.errors import UnsupportedModelError
from kvote.hf import switch
from kvote.hf.guard import guard
from kvote.hf.layer_facts import LayerFacts
from kvote.hf.trial import Facts, find_out
from kvote.rope import Rope

_known: "WeakKeyDictionary[torch.nn.Module, tuple[Any, Facts | UnsupportedModelError]]" = WeakKeyDictionary()


_lock = threading.RLock()


def facts_of(model: PreTrainedModel) -> Facts:
    """The trial's outcome, and the model switched to kvote's attention. The trial runs once per model, and anew after
    its modules, weights, adapters or config have changed; threads wait for each other.

    Raises UnsupportedModelError as the trial.
    """
    with _lock:
        state = _state(model)
        known = _known.get(model)
        if known is None or known[0] != state or (isinstance(known[1], Facts) and not switch.is_attached(model)):
            known = _known[model] = state, _outcome(model)
    if isinstance(known[1], UnsupportedModelError):
        raise UnsupportedModelError(*known[1].args)
    return known[1]


def _outcome(model: PreTrainedModel) -> Facts | UnsupportedModelError:
    try:
        facts = find_out(model)
    except UnsupportedModelError as error:
        # Without its frames, which would keep the trial's tensors.
        return UnsupportedModelError(*error.args)
    guard(model, facts.throws_away)
    return facts


def detach(model: PreTrainedModel) -> None:
    """Gives ``model``, and models that share its config, back as before the first ``kvote.Cache``, and unwatched.

    A kvote cache that is still used with it raises InactiveCacheError; a new one switches the model again.
    """
    switch.switch_back(model)
    guard(model, None)
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
    """Changes with what a trial depends on: modules, weights, adapters, config."""
    modules = list(model.modules())
    weights = tuple((id(p), None if p.is_inference() else p._version) for p in model.parameters())
    adapters = tuple(
        (str(module.active_adapter), bool(getattr(module, "merged", False)), bool(module.disable_adapters))
        for module in modules
        if hasattr(module, "active_adapter") and hasattr(module, "disable_adapters")
    )
    return tuple(map(id, modules)), weights, _corners(model), adapters, repr(model.config.to_dict())


def _corners(model: torch.nn.Module) -> tuple[bytes, ...]:
    """The first and last number of every weight, since what is written through ``.data`` changes no version; read from
    each device at once."""
    corners: dict[torch.device, list[torch.Tensor]] = {}
    for p in model.parameters():
        if _readable(p):
            corners.setdefault(p.device, []).extend(p.detach()[(at,) * p.dim()].float() for at in (0, -1))
    return tuple(torch.stack(found).cpu().numpy().tobytes() for found in corners.values())


def _readable(weight: torch.Tensor) -> bool:
    """Whether a weight is a plain tensor that holds numbers: no meta tensor, and none of a quantiser's own types."""
    return type(weight.data) is torch.Tensor and not weight.is_meta and weight.numel() > 0
