"""The GPU kernels, as functions of tensors, in Triton. Contracts as in ``kvote.kernels.contract``.

Loaded only where they are to run (``kvote.kernels.gpu`` says why not). Nothing here waits for the device: lengths and
limits are numbers that the host knows, or tensors that it never looks at, so that a decode step can be captured in a
CUDA graph. On the CPU they run in Triton's interpreter (``TRITON_INTERPRET=1``), which shows what they compute and
nothing about their speed.
"""

from kvote.kernels.gpu import why_not
from kvote.kernels.law import thin_decode, why_not_thin
from kvote.kernels.triton import packed
from kvote.kernels.triton.attend import attend
from kvote.kernels.triton.attend import why_not as why_not_attend
from kvote.kernels.triton.decode import MAX_QUERIES_PER_KV, decode
from kvote.kernels.triton.labels import label_scores
from kvote.kernels.triton.mass import attention_mass
from kvote.kernels.triton.merge import merge_parts
from kvote.kernels.triton.sketch import SKETCH_TOKENS, sketch, sketch_bytes
from kvote.kernels.triton.tokens import append, gather, rotate
from kvote.kernels.triton.votes import scores, select, top_k, votes

NAME = "triton"
step = None
ASKING_WAITS = True

__all__ = [
    "ASKING_WAITS",
    "MAX_QUERIES_PER_KV",
    "NAME",
    "SKETCH_TOKENS",
    "append",
    "attend",
    "attention_mass",
    "decode",
    "gather",
    "label_scores",
    "merge_parts",
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
