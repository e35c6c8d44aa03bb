"""Which backends run here, each tried, and why the others do not: what ``kvote env`` shows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvote.kernels import fused, gpu
from kvote.kernels.choice import backend, forced
from kvote.kernels.cpu import library


@dataclass(frozen=True)
class State:
    """One implementation of the kernels. ``missing`` is the reason why it cannot run here, None if it can."""

    name: str
    computes: str
    in_use: bool
    missing: str | None


def states() -> list[State]:
    """The state of every implementation; each that claims to run is tried."""
    found, asked = [], forced() and backend()
    for name, (computes, probe) in _PROBES.items():
        missing = probe()
        if name == "cpu" and missing is None:
            computes = f"{computes} with {library.instruction_set()}"
        # The reference does whatever the others cannot; the interpreter of GPU kernels only what it is asked for.
        in_use = name == "reference" or (missing is None and asked in (None, name, *_BESIDE.get(name, ())))
        if name == "triton" and missing is None and gpu.interpreted():
            computes, in_use = f"{computes}; here interpreted on the CPU", asked == name
        found.append(State(name, computes, in_use, missing))
    return found


def _reference() -> str | None:
    return None


def _fused() -> str | None:
    query, key = torch.zeros(1, 2, 3, 32), torch.zeros(1, 1, 5, 32)
    try:
        fused.attend(query, key, key, scale=1.0, causal=True, window=None)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        return f"this torch has no fused CPU attention that kvote can call ({str(error).splitlines()[0]})"
    return None


# What each implementation computes, and a probe that gives the reason why it cannot run here.
_PROBES: dict[str, tuple[str, Callable[[], str | None]]] = {
    "reference": ("everything, in plain torch", _reference),
    "fused": ("attention, torch's fused CPU kernel", _fused),
    "cpu": ("votes, top-k, gathering and sketches, C++", library.why_not),
    "triton": ("everything, on a GPU", gpu.why_not),
}
# What goes on answering for the rest where one is forced.
_BESIDE = {"fused": ("cpu", "triton")}
