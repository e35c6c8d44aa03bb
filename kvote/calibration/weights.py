"""The weights of a model's decoder as they act: without its vocabulary, with what adapters add, wherever they lie."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvote.errors import UnsupportedModelError


@dataclass(frozen=True)
class _Place:
    """A parameter of a module, and the hooks that may know where it lies: each with the name that it goes by there."""

    module: nn.Module
    name: str
    maps: tuple[tuple[Any, str], ...]
    adapters: Any = None


def matrices(model: Any, most: int, part: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """``part`` of at most so many weights of two and more axes, evenly spaced over the decoder of ``model``.

    Raises UnsupportedModelError for weights that cannot be read.
    """
    decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    inside = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
    places = list(_places(decoder, head, tuple((held, inside) for held, _ in _offloaded(model)), set()))
    count = min(most, len(places))
    return [_read(places[i * len(places) // count], part) for i in range(count)]


def _places(
    module: nn.Module, head: nn.Module | None, maps: tuple[tuple[Any, str], ...], seen: set[int], adapters: Any = None
) -> Iterator[_Place]:
    if module is head or isinstance(module, nn.Embedding) or id(module) in seen:
        return
    seen.add(id(module))
    maps = (*_offloaded(module), *maps)
    # What adapters of PEFT wrap, by what all of them have in common.
    if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
        inside = tuple((held, f"{prefix}base_layer.") for held, prefix in maps)
        yield from _places(module.get_submodule("base_layer"), head, inside, seen, module)
        return
    if hasattr(module, "original_module") and hasattr(module, "modules_to_save"):
        name = _chosen(module)
        inside = tuple((held, f"{prefix}{name}.") for held, prefix in maps)
        yield from _places(module.get_submodule(name), head, inside, seen)
        return
    for name, weight in module.named_parameters(recurse=False):
        if weight.dim() > 1 and weight.numel() and id(weight) not in seen:
            seen.add(id(weight))
            yield _Place(module, name, maps, adapters)
    for name, child in module.named_children():
        yield from _places(child, head, tuple((held, f"{prefix}{name}.") for held, prefix in maps), seen)


def _chosen(module: Any) -> str:
    """Which copy of a module that was trained along answers now."""
    active = [name for name in module.active_adapters if name in module.modules_to_save]
    return f"modules_to_save.{active[0]}" if active and not module.disable_adapters else "original_module"


def _offloaded(module: nn.Module) -> tuple[tuple[Any, str], ...]:
    """The mappings in which accelerate's hooks keep the weights of a module that is offloaded."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return tuple((held, "") for held in (getattr(each, "weights_map", None) for each in hooks) if held is not None)


def _read(place: _Place, part: Callable[[Tensor], Tensor]) -> Tensor:
    weight = getattr(place.module, place.name).detach()
    try:
        if weight.device.type == "meta":
            weight = _from_hooks(place)
        # Spread over several devices.
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        return part(_with_adapters(weight, place))
    except UnsupportedModelError:
        raise
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise UnsupportedModelError(
            f"A weight of {type(place.module).__name__} cannot be read ({str(error).splitlines()[0]}), so that nobody "
            "can tell which model a calibration belongs to; load the model in plain weights."
        ) from error


def _from_hooks(place: _Place) -> Tensor:
    for held, prefix in place.maps:
        try:
            found = held[f"{prefix}{place.name}"]
        except KeyError:
            continue
        if isinstance(found, Tensor) and found.device.type != "meta":
            return found.detach()
    raise UnsupportedModelError(
        "The model's weights lie on the meta device, where they have no values; load them before you calibrate."
    )


def _with_adapters(weight: Tensor, place: _Place) -> Tensor:
    """The weight in effect: its own, and what active adapters that are not merged into it add."""
    adapters = place.adapters
    if adapters is None or place.name != "weight" or adapters.disable_adapters:
        return weight
    for name in adapters.active_adapters:
        known = any(name in getattr(adapters, held, ()) for held in adapters.adapter_layer_names)
        if not known or name in adapters.merged_adapters:
            continue
        # Variants such as DoRA do more than to add.
        if not hasattr(adapters, "get_delta_weight") or name in getattr(adapters, "lora_variant", ()):
            raise UnsupportedModelError(
                f"What the adapter {name!r} does to a weight is not known to kvote; merge it into the model "
                "(merge_and_unload) before you calibrate or build a cache with a calibration."
            )
        with torch.no_grad():
            weight = weight + adapters.get_delta_weight(name).detach().to(weight.device, weight.dtype)
    return weight
