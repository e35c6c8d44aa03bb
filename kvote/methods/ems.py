"""EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression (Li et al. 2024, arXiv 2412.08521)."""

from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.merge.into_similar import IntoSimilar
from kvote.keep.score.overall_or_recent import OverallOrRecent
from kvote.method import Method, published


@published(rooms="keep", source="EMS-style, reconstructed from Li et al. 2024, arXiv 2412.08521")
def ems(
    budget: int | float | str = 256,
    window: int = 32,
    sinks: int = 4,
    merge: float = 2.0,
    threshold: float = 0.5,
    remove_positions: bool = True,
    per_head: bool = True,
    evict_generated: bool = True,
) -> Method:
    """EMS-style: drops what is irrelevant, and merges some of the rest into the important tokens that it resembles.

    This is a reconstruction from the paper's abstract and its public reviews; no code was published, and where they are
    silent the choices are kvote's own. A token is as important as the larger of the attention it received from all
    queries and from the last ``window`` ones, after both have been given the same mean in each head. The first
    ``sinks`` and the last ``window`` tokens stay, and with them the most important ones, up to ``budget``. Of the rest,
    the next ``merge`` times as many as the important ones are each compared with all tokens that stay: by the cosine
    of their keys times that of their values, or 0 where the keys point apart. A token goes into its most similar one
    if that is at least ``threshold``; otherwise, like all further tokens, it is gone. A merged token has the mean
    value of its class, and a key of the mean direction and mean length, all weighted by importance; its importance is
    from then on that of the class. It counts as one token in the softmax.

    ``budget``: tokens kept, as a number (1024), a fraction of the tokens seen (0.25) or bytes ("512MiB"). A prompt is
    cut down at its end. ``evict_generated``: generated tokens stay until there are more than ``window`` of them above
    the budget, and then all that is held is cut down anew; the attention of those last queries is the recent one.
    With False, tokens are dropped with prompts only. ``remove_positions``: keys are compared and merged without their
    rotation, and a merged key stands at the position of the token that stayed; with False, as they are held (which
    is without rotation, too, where a reader or store holds them so). ``per_head``: every key head keeps its own
    tokens; with False all keep the same, by the sum over heads, and only what is merged into them differs.

    Heads that share keys are added up before the two kinds of attention are compared. Sums are not divided by the
    number of queries that could see a token. Counts are the same in all heads. Sinks and recent tokens take part as
    tokens that others may be merged into. ``merge=0`` only drops.

    Missing of what the abstract and the reviews tell: sizes of the classes that differ from head to head, held together
    in one expanded tensor (here all heads keep equally many); pooling of importance over neighbours; and the paper's
    kernel that adds up attention inside flash attention (here a second pass over the keys does).
    """
    score = OverallOrRecent(window=window, generated=evict_generated, per_head=per_head)
    into, limit = IntoSimilar(merge, threshold, remove_positions), read_budget(budget)
    return Method(keep=Evict(score, limit, window, sinks, evict_generated, burst=1, merge=into, slack=window))
