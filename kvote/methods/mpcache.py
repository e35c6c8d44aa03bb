"""MPCache: MPC-friendly KV cache eviction for efficient private LLM inference (Zeng et al., NeurIPS 2025)."""

from kvote.keep.allocate.threshold import Threshold
from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.score.any_query import AnyQuery
from kvote.method import Method, published
from kvote.read.best_clusters import BestClusters


@published(rooms="keep, read", source="Zeng et al. 2025, arXiv 2501.06807")
def mpcache(
    budget: int | float | str = 0.3,
    threshold: float = 0.0,
    queries: float = 0.2,
    coarse: float = 0.5,
    fine: float = 0.2,
    alpha: float = 0.6,
    cluster: int = 16,
    share: int = 1,
    scaled: bool = True,
) -> Method:
    """Drops what no query of a prompt's end looks at; generated tokens read the clusters of the rest that match best.

    When a prompt has ended, a token is worth the most attention that any of its last queries gave it, in the mean over
    all heads; these are the share ``queries`` of the prompt, half of that beyond 24,000 tokens. All heads keep the same
    ``budget`` tokens of the largest worth, and none below ``threshold``. What is generated stays.

    Tokens held form clusters of ``cluster`` neighbours, and these form pairs. A generated token scores a cluster, or a
    pair, by its product with ``alpha`` times the largest plus 1 - ``alpha`` times the smallest number of each key
    channel there: linear in the query, and no bound. Each query head reads the best share ``fine`` of the clusters, of
    those in the best share ``coarse`` of the pairs. The first pair and cluster are always chosen besides, and the last
    ones where the last pair is not full; so in every 32nd token they may not be. In each group of ``share`` layers the
    first decides what all keep and read; 1: each for itself, as in the code released (a compiled file of its repository
    has layers that take over both, in groups that are not known). All else is read whole.

    Differs from the published code: its thresholds were set by task to keep 15% to 66% of a prompt, of products without
    scale; ``budget`` is the threshold that keeps so many, and without ``scaled`` weights are of such products. Later
    ones of the last queries are hidden from earlier ones, which the code does not do. Where first and last clusters
    are among the best anyway, the next best are read (the code reads fewer). Query heads that share keys score each for
    itself (it has no such models). What is dropped is freed.

    Missing: secure computation itself, which is what makes linear scores and few comparisons cheap; skipped layers.
    """
    score = AnyQuery(queries=queries, scaled=scaled, layers_alike=share)
    keep = Evict(score, read_budget(budget), evict_generated=False, allocate=Threshold(threshold, score))
    return Method(keep=keep, read=BestClusters(coarse, fine, alpha, cluster, share))
