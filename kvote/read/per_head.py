"""The tokens that each query head reads when it chooses on its own."""

from torch import Tensor

from kvote import kernels
from kvote.needs import Keys, Needs
from kvote.read.reader import ReaderDefaults, Reading
from kvote.tokens import Span, TokenSet

LISTS = Needs(keys=Keys.ROTATED, lists=True)


class ReadsLists(ReaderDefaults):
    """A reader whose heads list the tokens that they read, by scores of keys as the model rotated them."""

    @property
    def needs(self) -> Needs:
        return LISTS


def winners(scores: Tensor, k: int) -> Tensor:
    """The ``k`` tokens with the highest ``scores`` [b, r, heads, n] of each head: int64 [b, heads, r, k], ascending."""
    return kernels.top_k(scores.transpose(1, 2), k)


def span_of(reading: Reading, index: Tensor) -> Span:
    """All query rows of a reading, each head reading its own tokens ``index`` [b, heads, t, k] where they stand."""
    reading.activity.tokens_read = index.shape[-1]
    # Whoever chose looked only at tokens before the query, so nothing is left to hide.
    return Span(0, reading.count, [TokenSet(index, causal=False)])
