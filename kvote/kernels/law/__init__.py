"""The backend that runs everywhere: the law of ``kvote.kernels.reference`` over pages, for whatever no other one reads.

Contracts as in ``kvote.kernels.contract``. Single queries are not answered from pages (``MAX_QUERIES_PER_KV``): their
tokens are fetched, and torch's own attention reads those.
"""

from kvote.kernels.law import packed
from kvote.kernels.law.attention import attend, attention_mass, decode, thin_decode, why_not_attend, why_not_thin
from kvote.kernels.law.scoring import (
    SKETCH_TOKENS,
    label_scores,
    scores,
    select,
    sketch,
    sketch_bytes,
    votes,
)
from kvote.kernels.law.tokens import append, gather, rotate, why_not
from kvote.kernels.reference import centre, top_k

NAME = "reference"
step = None
MAX_QUERIES_PER_KV = 0
ASKING_WAITS = False

__all__ = [
    "ASKING_WAITS",
    "MAX_QUERIES_PER_KV",
    "NAME",
    "SKETCH_TOKENS",
    "append",
    "attend",
    "attention_mass",
    "centre",
    "decode",
    "gather",
    "label_scores",
    "packed",
    "rotate",
    "scores",
    "select",
    "sketch",
    "sketch_bytes",
    "step",
    "thin_decode",
    "top_k",
    "votes",
    "why_not",
    "why_not_attend",
    "why_not_thin",
]
