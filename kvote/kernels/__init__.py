"""Kernels: attention over tokens, scores, votes, top-k. Nothing here knows a store, a method or transformers.

``reference`` is the law (short torch, float32). ``cpu`` is C++ and runs where it was compiled; attention over blocks
of queries goes through torch's own fused CPU kernel (``fused``). ``triton`` runs on GPUs and is loaded only there.
``KVOTE_BACKEND=reference`` forces the law everywhere.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvote.errors import InputError
from kvote.kernels import cpu, fused, gpu, reference
from kvote.kernels.cpu import one_step
from kvote.kernels.masks import end_aligned
from kvote.kernels.reference import forbid, max_pool, merge, scores, soft_votes, with_sink_logits

__all__ = [
    "attend",
    "attention_mass",
    "backend",
    "chosen",
    "compiled",
    "forbid",
    "in_one_step",
    "max_pool",
    "merge",
    "named",
    "rotate",
    "scores",
    "soft_votes",
    "top_k",
    "with_sink_logits",
]

# Float32 logits that the reference holds at a time (64 MiB).
_LOGITS_HELD = 1 << 24


# Those that are faster than the law, and whether one can run at all or read a tensor.
_FAST = {"cpu": cpu.why_not, "triton": gpu.why_not}


def backend() -> str:
    """The backend in force for tensors on the CPU: ``KVOTE_BACKEND``, or the fastest one that runs here.

    Raises InputError for one that does not exist or cannot run.
    """
    forced = os.environ.get("KVOTE_BACKEND")
    if forced is None:
        return "cpu" if cpu.why_not() is None else "reference"
    if forced not in (*_FAST, "reference"):
        raise InputError(f"KVOTE_BACKEND must be 'cpu', 'triton' or 'reference'; got {forced!r}.")
    missing = _FAST[forced]() if forced in _FAST else None
    if missing is not None:
        raise InputError(f"KVOTE_BACKEND={forced} cannot run: {missing}.")
    return forced


def chosen(*tensors: Tensor) -> str:
    """The backend that is to read these tensors: 'cpu', 'triton', or 'reference' where neither can or may.

    Raises InputError as ``backend``.
    """
    names = list(_FAST) if os.environ.get("KVOTE_BACKEND") is None else [backend()]
    for name in names:
        # The interpreter of GPU kernels is there for tests, which ask for it.
        asked = len(names) == 1 or name != "triton" or not gpu.interpreted()
        if name in _FAST and asked and all(_FAST[name](tensor) is None for tensor in tensors):
            return name
    return "reference"


def named(backend: str) -> Any:
    """The kernels 'cpu' or 'triton': modules of the same functions."""
    return cpu if backend == "cpu" else importlib.import_module("kvote.kernels.triton")


def in_one_step(backend: str) -> Callable[..., tuple[Tensor, bool]] | None:
    """The kernel that stores a generated token and answers its query (``cpu.one_step``); None where there is none."""
    return one_step.step if backend == "cpu" else None


def compiled(*tensors: Tensor) -> bool:
    """Whether the C++ kernels are to read these tensors."""
    return chosen(*tensors) == "cpu"


def top_k(votes: Tensor, k: int) -> Tensor:
    """``reference.top_k``; where the C++ kernel runs, equal votes go to the lower index."""
    if backend() == "cpu" and cpu.why_not() is None and votes.device.type == "cpu":
        return cpu.top_k(votes, k)
    return reference.top_k(votes, k)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """``reference.rotate``; ``x`` [..., n, d], ``cos`` and ``sin`` [n or 1, r] or [b, 1, n, r]."""
    rows = (cos.dim() == 2 and cos.shape[0] == x.shape[-2]) or (
        cos.dim() == x.dim() == 4 and cos.shape[1] == 1 and cos.shape[0] in (1, x.shape[0])
    )
    backend = chosen(x) if rows and x.stride(-1) == 1 and cos.dtype == torch.float32 else "reference"
    if backend == "reference":
        return reference.rotate(x, cos, sin, interleaved=interleaved)
    if cos.dim() == 4:
        cos, sin = cos.squeeze(1), sin.squeeze(1)
    flat = x if x.dim() == 4 else x.reshape(1, -1, *x.shape[-2:])
    turned: Tensor = named(backend).turn(flat, (cos.contiguous(), sin.contiguous()), interleaved)
    return turned if x.dim() == 4 else turned.view(x.shape)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``reference.attend`` with the mask given as a rule: rows are the last entries of the list (``masks``)."""
    if chosen(query, key) == "triton" and named("triton").why_not_attend(query, key, value) is None:
        attend = named("triton").attend
        return attend(query, key, value, scale=scale, softcap=softcap, causal=causal, window=window)
    if os.environ.get("KVOTE_BACKEND") != "reference" and fused.why_not(query, key, value, softcap) is None:
        return fused.attend(query, key, value, scale=scale, causal=causal, window=window)
    return _in_rows(query, key, value, scale=scale, softcap=softcap, causal=causal, window=window)


def _in_rows(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, softcap: float | None, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """The law on blocks of rows, so that no logits of all queries by all tokens exist at once."""
    t, m = query.shape[2], key.shape[2]
    rows = max(1, _LOGITS_HELD // max(1, query.shape[0] * query.shape[1] * m))
    answers = []
    for start in range(0, t, rows):
        stop = min(t, start + rows)
        seen = m - t + stop if causal else m
        mask = end_aligned(stop - start, seen, window, query.device) if causal else None
        part = query[:, :, start:stop]
        answers.append(
            reference.attend(part, key[:, :, :seen], value[:, :, :seen], scale=scale, mask=mask, softcap=softcap)
        )
    if len(answers) == 1:
        return answers[0]
    return torch.cat([out for out, _ in answers], dim=2), torch.cat([lse for _, lse in answers], dim=2)


def attention_mass(
    query: Tensor,
    lse: Tensor,
    key: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """``reference.attention_mass`` [b, h, m] with the mask given as a rule, as in ``attend``; ``lse`` is that of all
    tokens that a row reads, of which ``key`` may hold only some."""
    t, m = query.shape[2], key.shape[2]
    limits = list(range(m - t + 1, m + 1)) if causal else [m] * t
    return reference.attention_mass(query, lse, key, 0, limits, scale=scale, softcap=softcap, window=window)
