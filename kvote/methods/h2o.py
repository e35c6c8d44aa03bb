"""H2O: Heavy-Hitter Oracle for generative inference of large models (Zhang et al., NeurIPS 2023, arXiv 2306.14048)."""

from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict, recent_share
from kvote.keep.score.attention_received import AttentionReceived
from kvote.method import Method, published


@published(rooms="keep", source="Zhang et al. 2023, arXiv 2306.14048")
def h2o(
    budget: int | float | str = 0.2, recent: float = 0.5, per_head: bool = True, burst: int | None = None
) -> Method:
    """Keeps the tokens that have received the most attention so far (heavy hitters), and the most recent ones.

    Every token adds up the attention that it receives from all queries, its own included, for as long as it is held.
    After each pass, the tokens with the largest sums among those that are not recent stay; the rest is gone, and its
    sums are forgotten. A prompt is read in full and cut down at its end, so its own logits are exact. Generating,
    they go in bursts.

    ``budget``: tokens kept, as a number (1024), a fraction of the tokens seen (0.2, the paper's 10% + 10%) or bytes
    ("512MiB"). ``recent``: the share of it that is for recent tokens (the paper: half). ``per_head``: every key head
    keeps its own tokens; with False all keep the same, by the sum over heads, which readers such as ``tokenselect``
    need.

    ``burst``: once a generated token exceeds the budget, so many go at once (64 at most): what stays is moved once in
    so many steps, and up to ``burst`` - 1 tokens fewer than the budget are held in between. None is a 64th of the
    budget, which below 128 tokens is one per step, as in the paper; 1 is that for any budget. A burst drops by the sums
    at its end.

    The end of every pass counts as a prompt's end, unless ``Cache.expect`` announced a prompt in several passes.
    Sums are not divided by the number of queries that could see a token, as in the paper, so early tokens have an
    advantage. Heads that share keys are added up (the paper has no such heads), and sequences of a batch are kept
    apart (the published code adds them up). Positions stay the text's own (the published code's streaming variant
    renumbers them). A fraction follows the text as it grows; the published simulation fixes it at the prompt. Missing:
    that streaming variant, the simulations with masks, and the replacing of single slots on FlexGen, which are not the
    same method.
    """
    return Method(
        keep=Evict(AttentionReceived(per_head=per_head), read_budget(budget), recent_share(recent), burst=burst)
    )
