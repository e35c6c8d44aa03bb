"""Kernels: attention over tokens, scores, votes, top-k. Nothing here knows a store, a method or transformers.

``reference`` is the law (short torch, float32). ``cpu`` is C++ and runs where it was compiled; attention over blocks
of queries goes through torch's own fused CPU kernel (``fused``). ``KVOTE_BACKEND=reference`` forces the law everywhere.
"""

import os

from torch import Tensor

from kvote.kernels import cpu, fused, reference
from kvote.kernels.masks import end_aligned
from kvote.kernels.reference import forbid, max_pool, merge, scores, soft_votes, with_sink_logits

__all__ = [
    "attend",
    "backend",
    "compiled",
    "forbid",
    "max_pool",
    "merge",
    "scores",
    "soft_votes",
    "top_k",
    "with_sink_logits",
]


def backend() -> str:
    """The backend in force: ``KVOTE_BACKEND``, or the fastest one that runs here."""
    forced = os.environ.get("KVOTE_BACKEND")
    return forced or ("cpu" if cpu.why_not() is None else "reference")


def compiled(*tensors: Tensor) -> bool:
    """Whether the C++ kernels are to read these tensors."""
    return backend() == "cpu" and all(cpu.why_not(tensor) is None for tensor in tensors)


def top_k(votes: Tensor, k: int) -> Tensor:
    """``reference.top_k``; where the C++ kernel runs, equal votes go to the lower index."""
    if backend() == "cpu" and cpu.why_not() is None and votes.device.type == "cpu":
        return cpu.top_k(votes, k)
    return reference.top_k(votes, k)


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
    if os.environ.get("KVOTE_BACKEND") != "reference" and fused.why_not(query, key, value, softcap) is None:
        return fused.attend(query, key, value, scale=scale, causal=causal, window=window)
    mask = end_aligned(query.shape[2], key.shape[2], window, query.device) if causal else None
    return reference.attend(query, key, value, scale=scale, mask=mask, softcap=softcap)
