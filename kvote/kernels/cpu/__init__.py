"""The C++ backend: functions of tensors as ``kvote.kernels.contract`` has them; addresses never escape.

Threads follow ``torch.get_num_threads()``. Attention over blocks of queries goes through torch's own fused kernel.
"""

from kvote.kernels.cpu import packed
from kvote.kernels.cpu.attention import MAX_QUERIES_PER_KV, attention_mass, decode, thin_decode, why_not_thin
from kvote.kernels.cpu.library import (
    _cpu,
    instruction_set,
    instruction_sets,
    read_all,
    use,
    use_large_pages,
    why_not,
)
from kvote.kernels.cpu.one_step import step
from kvote.kernels.cpu.scoring import (
    SKETCH_TOKENS,
    label_scores,
    scores,
    select,
    sketch,
    sketch_bytes,
    top_k,
    votes,
)
from kvote.kernels.cpu.tokens import append, gather, rotate
from kvote.kernels.fused import attend
from kvote.kernels.fused import why_not as why_not_attend

NAME = "cpu"
ASKING_WAITS = False

__all__ = [
    "ASKING_WAITS",
    "MAX_QUERIES_PER_KV",
    "NAME",
    "SKETCH_TOKENS",
    "_cpu",
    "append",
    "attend",
    "attention_mass",
    "decode",
    "gather",
    "instruction_set",
    "instruction_sets",
    "label_scores",
    "packed",
    "read_all",
    "rotate",
    "scores",
    "select",
    "sketch",
    "sketch_bytes",
    "step",
    "thin_decode",
    "top_k",
    "use",
    "use_large_pages",
    "votes",
    "why_not",
    "why_not_attend",
    "why_not_thin",
]
