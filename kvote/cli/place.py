"""The device and dtype that weights are loaded to."""

from importlib.util import find_spec
from typing import Any

import torch

from kvote.errors import InputError


def place_of(name: str) -> torch.device:
    """The device of that name. Raises InputError for one that torch does not know or cannot use here."""
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.zeros(1, device=device).add(1).item()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, ImportError) as error:
        said = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
        raise InputError(
            f"torch cannot use the device {name!r} here: {said}; leave --device out for the CPU."
        ) from error
    return device


def rounding(load_in: str | None, device: torch.device, *, is_gguf: bool) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that round weights to ``load_in``. Raises InputError where that cannot be."""
    if load_in is None:
        return {}
    if is_gguf:
        raise InputError("A GGUF file holds its weights in a format of its own; leave --load-in out.")
    if find_spec("torchao") is None:
        raise InputError(f"Weights are rounded to {load_in} by torchao; install it: pip install 'kvote[torchao]'.")
    if load_in == "int4" and device.type == "cpu":
        raise InputError(
            "torchao has no kernels for int4 weights on the CPU; use --load-in int8, or a GGUF file of 4-bit weights."
        )
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    kind = Int8WeightOnlyConfig() if load_in == "int8" else Int4WeightOnlyConfig()
    # Rounded where it stays: 4-bit weights are packed for one kind of device.
    where = {} if device.type == "cpu" else {"device_map": {"": device}}
    return {"quantization_config": TorchAoConfig(kind), **where}
