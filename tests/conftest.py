"""Every test starts from the same seed, and memory that kvote leaves uninitialised is poison."""

import os
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

# Without a GPU, Triton's interpreter stands in for one. Triton asks when it is loaded.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The models here are tiny: a second thread would only wait for the first, and for every other process.
torch.set_num_threads(1)


# torch notes once what makes tensors on a device; it must not note the poisoned ones.
with torch.device("meta"):
    torch.empty(0)


def _poison_of(dtype: torch.dtype) -> float:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max // 3


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        made = make(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").split(".")[0] == "kvote":
            made.fill_(_poison_of(made.dtype))
        return made

    return call


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ``torch.empty`` and its kin return NaN, or large integers, to kvote's own code."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def seeds() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
