"""Whether weights are those of their config: transformers reports what did not fit, and goes on with random numbers."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

_NAMED = 2
_FRACTIONAL = ("F", "BF")


def misfit(model: nn.Module, report: Mapping[str, Any]) -> str | None:
    """Why ``model`` is not what its files say, as a clause; None if every weight that it needs came from them.

    ``report`` is what ``from_pretrained(..., output_loading_info=True)`` gives beside the model. Tied weights and
    towers of other modalities are no misfit; weights of decoder layers that the config does not know are one.
    """
    if missing := sorted(report["missing_keys"]):
        return f"{_counted(missing)} missing from the weights, and would be random numbers"
    if mismatched := sorted(report["mismatched_keys"], key=lambda each: str(each[0])):
        name, stored, expected = mismatched[0]
        others = f", and {len(mismatched) - 1:,} more do not fit either" if len(mismatched) > 1 else ""
        return f"{name} is stored as {_shape(stored)} and its config asks for {_shape(expected)}{others}"
    if report["error_msgs"]:
        return str(report["error_msgs"][0])
    if ignored := sorted(key for key in report["unexpected_keys"] if _matters(model, key)):
        return f"{_counted(ignored)} stored with the weights, but its config has no place for them"
    return None


def not_floating(folder: str) -> str | None:
    """Why the files in a folder are not those of a model that is not quantised: whole numbers, which transformers takes
    for weights. As a clause; None if all are fractional, and for a hub name."""
    for path in sorted(Path(folder).glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in [key for key in file.keys() if key.endswith(".weight")]:  # noqa: SIM118
                kind = file.get_slice(key).get_dtype()
                if not kind.startswith(_FRACTIONAL):
                    return f"{key} is stored as {kind}, and its config names no quantisation that transformers knows"
    return None


def _matters(model: nn.Module, key: str) -> bool:
    """Whether the weight of that name belongs to a layer or a projection that the model has, or one layer further."""
    *path, leaf = key.split(".")
    module = model
    in_layers = False
    for name in path:
        if isinstance(module, nn.ModuleList) and name.isdigit():
            in_layers = True
            if int(name) >= len(module):
                # Layers that predict tokens further ahead stand behind the others; transformers leaves them out.
                return int(name) >= len(module) + _ahead(model)
        inner = getattr(module, name, None)
        if not isinstance(inner, nn.Module):
            return (in_layers or _has_weights(module)) and leaf in ("weight", "bias")
        module = inner
    # What an old release stored in a module without weights of its own was a mask.
    return _has_weights(module) and leaf not in dict(module.named_buffers(recurse=False))


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _ahead(model: nn.Module) -> int:
    count = getattr(model.config, "num_nextn_predict_layers", None)
    return count if isinstance(count, int) else 0


def _counted(names: list[str]) -> str:
    shown, more = ", ".join(names[:_NAMED]), len(names) - _NAMED
    return f"{shown} and {more:,} more are" if more > 0 else f"{shown} {'is' if len(names) == 1 else 'are'}"


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))
