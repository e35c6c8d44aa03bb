"""Whether the Triton kernels can run, found out without loading Triton."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
# The first NVIDIA GPUs whose matrix units multiply bfloat16.
_AMPERE = (8, 0)
_LARGEST = 256


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU (``TRITON_INTERPRET=1``, set before Triton is loaded)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def why_not(tensor: Tensor | None = None) -> str | None:
    """The reason the Triton kernels cannot read ``tensor`` (or cannot run at all), or None."""
    if not _installed():
        return "Triton is not installed (pip install 'kvote[gpu]')"
    if not interpreted() and _no_gpu() is not None:
        return _no_gpu()
    if tensor is None:
        return None if interpreted() else _too_old(torch.device("cuda", torch.cuda.current_device()))
    if tensor.device.type != ("cpu" if interpreted() else "cuda"):
        return f"tensors are on {tensor.device.type}"
    if tensor.dtype not in _TYPES:
        return f"{tensor.dtype} is not read"
    if tensor.shape[-1] % 16 or tensor.shape[-1] > _LARGEST:
        return f"the head size {tensor.shape[-1]} is not a multiple of 16 up to {_LARGEST}"
    return None if interpreted() else _too_old(tensor.device)


@cache
def _no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return "the GPU is not one of NVIDIA's" if torch.version.hip is not None else None


@cache
def _too_old(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= _AMPERE:
        return None
    return f"the GPU has compute capability {major}.{minor}, and the kernels need 8.0"
