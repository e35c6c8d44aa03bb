"""Kernels: attention over tokens, scores, votes, top-k. Nothing here knows a store, a method or transformers.

``contract`` says what a backend offers, and three implement it: ``law`` (short torch over ``reference``, float32) runs
everywhere; ``cpu`` is C++ and runs where it was compiled; ``triton`` runs on GPUs and is loaded only there. ``chosen``
picks one for some tensors, and whoever holds it never asks which it is. ``KVOTE_BACKEND=reference`` forces the law.
"""

from kvote.kernels.choice import backend, chosen, named, why_not_compiled
from kvote.kernels.contract import Answer, Backend
from kvote.kernels.cpu.library import instruction_set, read_all, use_large_pages
from kvote.kernels.dense import attend, attention_mass, rotate, top_k, winners_within
from kvote.kernels.lanes import Lanes
from kvote.kernels.reference import (
    forbid,
    max_pool,
    merge,
    scores,
    soft_votes,
    votes_within,
    with_sink_logits,
)

__all__ = [
    "Answer",
    "Backend",
    "Lanes",
    "attend",
    "attention_mass",
    "backend",
    "chosen",
    "forbid",
    "instruction_set",
    "max_pool",
    "merge",
    "named",
    "read_all",
    "rotate",
    "scores",
    "soft_votes",
    "top_k",
    "use_large_pages",
    "votes_within",
    "why_not_compiled",
    "winners_within",
    "with_sink_logits",
]
