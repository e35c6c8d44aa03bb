"""Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation (Feng et al., NeurIPS 2025, arXiv 2407.11550)."""

from kvote.keep.allocate.over_heads import CompetingHeads
from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.score.last_queries import LastQueries
from kvote.method import Method, published


@published(rooms="keep", source="Feng et al. 2024, arXiv 2407.11550")
def adakv(
    budget: int | float | str = 2048,
    window: int = 32,
    kernel: int = 7,
    pooling: str = "max",
    safeguard: float = 0.2,
) -> Method:
    """Keeps what the last queries of a prompt look at, more of it in heads that spread; what is generated stays.

    Tokens are judged as in ``snapkv``, which says what ``window``, ``kernel`` and ``pooling`` are; then the tokens of
    all key heads of a layer compete, and a head keeps as many as it has among the winners. ``safeguard``: the share of
    the budget besides the window that is divided evenly first; 1 is ``snapkv``. ``budget``: tokens kept per key head on
    average, the window among them, as a number, a fraction or bytes. Heads are rounded one by one, so that a layer may
    hold up to half a token per head more or less, except of a budget in bytes.

    Key heads really hold different numbers of tokens: what is given up is freed. Differs from the published code: query
    heads that share keys vote together (there, an option); a later turn is divided anew, where a head has no more than
    it holds. Missing: normalised scores, and layers that differ (its Pyramid variant).
    """
    score = LastQueries(window=window, kernel=kernel, pooling=pooling)
    limit = read_budget(budget)
    return Method(keep=Evict(score, limit, window, evict_generated=False, over_heads=CompetingHeads(safeguard)))
