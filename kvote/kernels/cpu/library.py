"""The compiled module, what it can read, and the instruction sets it can run.

SIMD is chosen when the module loads (AVX-512 with BF16 and VNNI, AVX-512 with VNNI, AVX2, or plain C++ for the compiler
to vectorise). The module links against the OpenMP runtime that torch has loaded, so both share one pool of threads.
"""

import importlib
from typing import Any

import torch
from torch import Tensor

# Any where it could not be compiled; nobody calls it then. torch must be imported first: it brings the OpenMP runtime.
_cpu: Any = None
_missing: str | None = None
try:
    _cpu = importlib.import_module("kvote.kernels.cpu._cpu")
except ImportError as error:
    _missing = f"the compiled module cannot be loaded ({error}); reinstall kvote with a C++ compiler at hand"

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MAX_DIM = 256


def why_not(tensor: Tensor | None = None) -> str | None:
    """The reason these kernels cannot read ``tensor`` (or cannot run at all), or None."""
    if _missing is not None or tensor is None:
        return _missing
    if tensor.device.type != "cpu":
        return f"tensors are on {tensor.device.type}"
    if tensor.dtype not in TYPES:
        return f"{tensor.dtype} is not read"
    if tensor.shape[-1] % 16 or tensor.shape[-1] > MAX_DIM:
        return f"the head size {tensor.shape[-1]} is not a multiple of 16 up to {MAX_DIM}"
    return None


def instruction_set() -> str:
    """The instruction set in use: avx512_bf16, avx512, avx2 or scalar."""
    return str(_cpu.instruction_set())


def instruction_sets() -> list[str]:
    """The instruction sets that this machine can run, fastest last."""
    return list(_cpu.instruction_sets())


def use(instruction_set: str) -> bool:
    """Forces an instruction set (for tests); False if this machine has not got it."""
    return bool(_cpu.use(instruction_set))


def use_large_pages(tensor: Tensor) -> None:
    """Asks the system for large pages behind a fresh tensor, which scattered reads need; harmless where it refuses."""
    if _missing is None and tensor.device.type == "cpu":
        _cpu.use_large_pages(tensor.data_ptr(), tensor.nbytes)


def read_all(memory: Tensor) -> None:
    """Reads a tensor and does nothing with it: what kernels can at best reach, to measure them against."""
    if _missing is None:
        _cpu.read_all(memory.data_ptr(), memory.nbytes, torch.get_num_threads())
    else:
        memory.view(torch.int64).sum()
