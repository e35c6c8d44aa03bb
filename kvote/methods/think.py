"""ThinK: Thinner Key Cache by Query-Driven Pruning (Xu et al., ICLR 2025, arXiv 2407.21018)."""

from kvote.method import Method, published
from kvote.store.thin import FewerChannels


@published(rooms="store", source="Xu et al. 2024, arXiv 2407.21018")
def think(ratio: float = 0.4, window: int = 32, recent: int = 32) -> Method:
    """Holds the keys of a prompt with fewer channels; values, the last tokens and all that is generated stay whole.

    When a prompt has ended, and has been answered with whole keys, every channel of a key head is scored: mean square
    of the last ``window`` queries there times mean square of the keys, which is how much of the scores comes from it.
    The int(``ratio`` * head size) lowest are taken out of the keys of all but the last ``recent`` tokens, and their
    memory is given back. Scores are still divided by the square root of the full head size. At 0.4, keys take 60%
    and the whole cache 80% of their bytes.

    This happens once per sequence, at the end of its first prompt that is longer than ``recent``: what comes later,
    further turns too, stays whole and nothing is scored again. Without ``Cache.expect``, the first pass is the prompt.
    Rolled back into its prompt, a sequence stays as thin as it is. Joined with a method that drops tokens, channels
    are scored on the keys that are left, with the queries of the last tokens of the whole prompt.

    Differs from the published code: the query heads of a key head decide together, by their mean square, and have one
    set of channels (there, keys are repeated for every query head first, which gives the saving away). Keys are scored
    as the model rotated them, so readers that hold keys without rotation are refused.

    Missing: pruning of value channels (an appendix of the paper); thin keys that are also quantised (published with
    KIVI: tokens that leave its residual lose the same channels); pruning keys without the exception of recent ones.
    """
    return Method(store=FewerChannels(ratio, window, recent))
