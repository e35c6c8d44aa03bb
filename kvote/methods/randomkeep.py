"""Random tokens kept: the baseline at equal bytes. A keeper that does not beat it has found nothing."""

from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.score.guarded import GuardedLot
from kvote.keep.score.random_score import RandomScore
from kvote.method import Method, published


@published(rooms="keep", source="baseline (arXiv 2609.03430)")
def randomkeep(
    budget: int | float | str = 2048,
    sinks: int = 4,
    window: int = 32,
    seed: int = 0,
    protect: float = 0.0,
    evict_generated: bool = False,
) -> Method:
    """A baseline: keeps sinks, a window and as many random tokens as the budget leaves; what is generated stays.

    At the end of a prompt, ``sinks`` first and ``window`` last tokens stay, and tokens from between them that win a
    draw; all key heads and all layers keep the same, at their own positions. The next turn is drawn together with
    all that is held then.

    ``budget``: tokens kept, sinks and window among them, as a number (1024), a fraction of the tokens seen (0.25) or
    bytes ("512MiB"). ``seed`` decides the draw, which depends on nothing else but a token's position. ``protect``: a
    share of the budget for the tokens whose values have the largest norms, each key head's own, before the rest is
    drawn: the two ideas of VaSE (Chang et al. 2026, arXiv 2606.03928), large values stay and chance decides among the
    others, without its rules for how others are drawn. ``evict_generated``: with True, generated tokens take part in
    the draw, and the budget holds while generating too.
    """
    score = RandomScore(seed=seed) if protect == 0 else GuardedLot(seed=seed, share=protect)
    return Method(keep=Evict(score, read_budget(budget), window, sinks, evict_generated=evict_generated))
