"""Kernels: attention over tokens, scores, votes, top-k. Nothing here knows a store, a method or transformers.

``reference`` is the law (short torch, float32). ``fused`` answers attention through torch's own fused CPU kernel.
``KVOTE_BACKEND=reference`` forces the law everywhere.
"""

import os

from torch import Tensor

from kvote.kernels import fused, reference
from kvote.kernels.masks import end_aligned
from kvote.kernels.reference import max_pool, merge, scores, soft_votes, top_k, with_sink_logits

__all__ = ["attend", "backend", "max_pool", "merge", "scores", "soft_votes", "top_k", "with_sink_logits"]


def backend() -> str:
    """The backend in force: ``KVOTE_BACKEND`` or the fastest one that runs here."""
    return os.environ.get("KVOTE_BACKEND", "fused")


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
    if backend() != "reference" and fused.why_not(query, key, value, softcap) is None:
        return fused.attend(query, key, value, scale=scale, causal=causal, window=window)
    mask = end_aligned(query.shape[2], key.shape[2], window, query.device) if causal else None
    return reference.attend(query, key, value, scale=scale, mask=mask, softcap=softcap)
