"""Which backend reads a tensor: the fastest that can, or the one that ``KVOTE_BACKEND`` names."""

import importlib
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, cast

from torch import Tensor

from kvote.errors import InputError
from kvote.kernels import gpu
from kvote.kernels.contract import Backend
from kvote.kernels.cpu import library
from kvote.kernels.packing import Packing

# Where each is; and of those that are faster than the law, what can be asked before they are loaded.
_MODULES = {"cpu": "kvote.kernels.cpu", "triton": "kvote.kernels.triton", "reference": "kvote.kernels.law"}
_FAST = {"cpu": library.why_not, "triton": gpu.why_not}


class _Held(ModuleType):
    """A backend as stores hold it: a copy of a store shares it, and a pickle names it."""

    def __deepcopy__(self, memo: dict[int, object]) -> "_Held":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return named, (self.NAME,)


def forced() -> str | None:
    """The backend that ``KVOTE_BACKEND`` forces, or None."""
    return os.environ.get("KVOTE_BACKEND")


def backend() -> str:
    """The backend in force for tensors on the CPU: ``KVOTE_BACKEND``, or the fastest one that runs here.

    Raises InputError for one that does not exist or cannot run.
    """
    name = forced()
    if name is None:
        return "cpu" if library.why_not() is None else "reference"
    if name not in _MODULES:
        raise InputError(f"KVOTE_BACKEND must be 'cpu', 'triton' or 'reference'; got {name!r}.")
    missing = _FAST[name]() if name in _FAST else None
    if missing is not None:
        raise InputError(f"KVOTE_BACKEND={name} cannot run: {missing}.")
    return name


def chosen(*tensors: Tensor) -> Backend:
    """The backend that is to read these tensors; the law where no other one can or may.

    Raises InputError as ``backend``.
    """
    if forced() is None:
        if _reads(library.why_not, tensors):
            return named("cpu")
        # The interpreter of GPU kernels is there for tests, which ask for it.
        return named("reference" if gpu.interpreted() or not _reads(gpu.why_not, tensors) else "triton")
    name = backend()
    return named(name if name in _FAST and _reads(_FAST[name], tensors) else "reference")


def _reads(why_not: Callable[[Tensor], str | None], tensors: tuple[Tensor, ...]) -> bool:
    for tensor in tensors:  # noqa: SIM110, a call less in every step
        if why_not(tensor) is not None:
            return False
    return True


def why_not_compiled(tensor: Tensor) -> str | None:
    """The reason the C++ kernels do not read ``tensor``, or None if they do. Raises InputError as ``backend``."""
    if forced() is not None and backend() != "cpu":
        return "KVOTE_BACKEND switches them off; unset it to use them"
    return library.why_not(tensor)


def packer(backend: Backend, form: Packing) -> Backend:
    """What packs in a form: ``backend``, or the law where values are clipped before they are rounded."""
    return backend if form.clip is None else named("reference")


@cache
def named(name: str) -> Backend:
    """The backend of that name: 'cpu', 'triton' or 'reference'."""
    module = importlib.import_module(_MODULES[name])
    module.__class__ = _Held
    return cast(Backend, module)
