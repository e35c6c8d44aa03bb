"""Random tokens kept: the baseline at equal bytes. A keeper that does not beat it has found nothing."""

from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.score.lot import Lot
from kvote.method import Method, published


@published(rooms="keep", source="baseline (arXiv 2609.03430)")
def randomkeep(budget: int | float | str = 2048, sinks: int = 4, window: int = 32, seed: int = 0) -> Method:
    """A baseline: keeps sinks, a window and as many tokens drawn by lot as the budget leaves; what is generated stays.

    At the end of a prompt, ``sinks`` first and ``window`` last tokens stay, and tokens from between them that win a
    draw; all key heads and all layers keep the same, at their own positions. The next turn is drawn together with
    all that is held then.

    ``budget``: tokens kept, sinks and window among them, as a number (1024), a fraction of the tokens seen (0.25) or
    bytes ("512MiB"). ``seed`` decides the draw, which depends on nothing else but a token's position.
    """
    return Method(keep=Evict(Lot(seed=seed), read_budget(budget), window, sinks, evict_generated=False))
