"""Key norms: a simple and effective L2 norm-based strategy for KV cache compression (Devoto et al., EMNLP 2024)."""

from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.score.key_norm import KeyNorm
from kvote.method import Method, published


@published(rooms="keep", source="Devoto et al. 2024, arXiv 2406.11430")
def knorm(
    budget: int | float | str = 2048, per_head: bool = True, evict_generated: bool = True, burst: int | None = None
) -> Method:
    """Keeps the tokens whose keys have the smallest norms, which tend to be those that much attention falls on.

    ``budget``, ``per_head`` and ``burst`` as in ``h2o``. ``evict_generated``: with False, generated tokens come on top.

    Differs from the published code: the newest token always stays, and tokens stay in the text's order. Missing: layers
    left whole, as the paper leaves the first two.
    """
    keep = Evict(KeyNorm(per_head=per_head), read_budget(budget), evict_generated=evict_generated, burst=burst)
    return Method(keep=keep)
