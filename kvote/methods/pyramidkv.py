"""PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling (Cai et al., arXiv 2406.02069)."""

from kvote.keep.allocate.pyramid import Pyramid
from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.score.last_queries import LastQueries
from kvote.method import Method, published


@published(rooms="keep", source="Cai et al. 2024, arXiv 2406.02069")
def pyramidkv(
    budget: int | float | str = 2048,
    window: int = 32,
    kernel: int = 5,
    pooling: str = "avg",
    beta: int = 20,
    per_head: bool = True,
) -> Method:
    """Keeps what the last queries of a prompt look at, more of it in shallow layers; what is generated stays.

    Tokens are chosen as in ``snapkv``, which says what ``window``, ``kernel``, ``pooling`` and ``per_head`` are.
    ``budget``: tokens kept per layer on average, the window among them, as a number, a fraction or bytes. Besides the
    window, the deepest layer keeps 1 / ``beta`` of the mean, the first twice the mean less that, and those between them
    fall in equal steps. Of texts shorter than twice the budget without the window, all layers keep the budget. 1 is
    ``snapkv``.

    Steps are rounded down, as published, so layers may hold up to half a token each more than the budget, except of a
    budget in bytes. Differs from the published code: query heads that share keys vote together, and a later turn is
    divided by the length of the whole text, as layers no longer hold equally much (there, by what the first prompt
    had). Missing: layers of groups of query heads that choose by the mean or the maximum.
    """
    score, limit = LastQueries(window=window, kernel=kernel, pooling=pooling, per_head=per_head), read_budget(budget)
    return Method(keep=Evict(score, limit, window, evict_generated=False, allocate=Pyramid(beta, window)))
