"""ZipCache: more bits for salient tokens (He et al., NeurIPS 2024, arXiv 2405.14256)."""

from kvote.errors import MethodError
from kvote.kernels.packing import BITS
from kvote.method import Method, published
from kvote.numbers import is_number, is_whole
from kvote.store.probed import Salient
from kvote.store.salient import Bits


@published(rooms="store", source="He et al. 2024, arXiv 2405.14256")
def zipcache(
    share: float = 0.6, high_bits: int = 4, low_bits: int = 2, gap: int = 100, probes: float = 0.1, seed: int = 0
) -> Method:
    """Holds tokens that receive much attention in 4 bits and all others in 2; reads all of them.

    When a prompt has ended, its last queries and some that were drawn by lot, together the share ``probes`` of all, say
    how much attention a token receives: the sum of what they pay, over how many of them can see it, so that early
    tokens have no advantage. In each key head the ``share`` of tokens with the most of it is held in ``high_bits`` per
    number, the rest in ``low_bits``. Of each kind, a key channel has one minimum and one scale for all tokens, however
    long the text. Values are divided, channel by channel, by the root of the largest magnitude that the channel has;
    then a token has one minimum and one scale over the channels of all key heads. In these rows the i-th tokens of a
    kind of all heads stand together, as in the published code, which need not be the same token.

    Generated tokens stay as they are until there are ``gap`` of them. Then all is decoded and rounded anew; which of
    the old tokens are salient stays. ``seed``: of the lot, which depends on positions only.

    Differs from the published code: the divisor counts the probes that see a token, as the paper has it (the code
    counts all later tokens), and generated tokens are judged by probes among them, as the paper has it (the code takes
    the last query). A prompt reads itself exactly; about, not exactly, half of the probes are drawn, each at most once;
    a later turn is judged when it has ended, with what was generated before it; sequences are encoded one by one, so
    batches do not share minima; channels that are all zero are divided by one; which token is salient is held in a bit.

    A crop keeps the codes of what stays. Dropped tokens have the others rounded again. Missing: kernels that read these
    codes (all is decoded for every query, so a step is slow).
    """
    for name, number in (("high_bits", high_bits), ("low_bits", low_bits)):
        if number not in BITS or not is_whole(number):
            raise MethodError(f"zipcache: {name} must be 2, 4 or 8; got {number!r}.")
    if not is_number(share) or not 0 <= share <= 1:
        raise MethodError(f"zipcache: share must be a number from 0 to 1; got {share!r}.")
    if not is_number(probes) or not 0 < probes <= 1:
        raise MethodError(f"zipcache: probes must be a number above 0 and at most 1; got {probes!r}.")
    for name, number, least in (("gap", gap, 1), ("seed", seed, 0)):
        if not is_whole(number) or not least <= number < 2**31:
            raise MethodError(f"zipcache: {name} must be a whole number of at least {least}; got {number!r}.")
    return Method(store=Salient(Bits(high_bits, low_bits), share, gap, probes, seed))
