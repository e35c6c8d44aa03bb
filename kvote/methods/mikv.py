"""MiKV: No Token Left Behind (Yang et al. 2024, arXiv 2402.18096)."""

from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict, recent_share
from kvote.keep.score.attention_received import AttentionReceived
from kvote.method import Method, published
from kvote.store.two_precisions import TwoPrecisions


@published(rooms="keep, store", source="Yang et al. 2024, arXiv 2402.18096")
def mikv(
    budget: int | float | str = 0.2,
    recent: float = 0.5,
    low_bits: int = 4,
    group: int = 64,
    balancer: bool = True,
    burst: int | None = None,
) -> Method:
    """Keeps the tokens that have received the most attention, and the most recent ones; the others stay in a few bits.

    Importance is that of ``h2o``. A token that ``h2o`` would drop is demoted instead: its keys and values are rounded
    to ``low_bits`` per number, with a scale and a minimum for each ``group`` of channels of the token, and go on
    answering every query, read from the codes. Demotion is one way. Sums go on growing from what queries really give,
    so the weights of important and of demoted tokens together add up to one.

    Keys are balanced before they are rounded: channel c is multiplied by sqrt(max |q_c| / max |k_c|), and queries are
    divided by it, so a channel is rounded as finely as queries use it. The largest magnitudes are those of the
    prompt's queries (all query heads of a key head) and keys, with their rotation; they are fixed when the first token
    is demoted, per sequence, key head and channel.

    ``budget``: important tokens, as a number (1024), a fraction of the tokens seen (0.2) or bytes ("512MiB", for
    important and demoted ones together; what is retained grows with the text, so fewer and fewer stay important; one
    does, even where the rest alone takes more than that).
    ``recent``: the share of it that is for recent tokens. ``low_bits``: 2, 4 or 8; 16 demotes without rounding, to
    tell the two apart. ``balancer``: False leaves keys as they are. ``burst``: once a generated token exceeds the
    budget, so many are demoted at once (64 at most), and up to ``burst`` - 1 fewer are important in between; None is a
    64th of the budget, 1 a token per step, as in ``h2o``.

    Known from the paper's abstract and accounts of it: accumulated attention decides, keys and values are rounded per
    token, asymmetrically and to nearest, and the balancer's formula. Assumed: demotion is that of H2O and never undone,
    and groups are half a head of 128 channels. Different: the paper's final configuration has 2 bits, which on a small
    real model (SmolLM2-135M) answered worse than dropping the same tokens, where 4 were as good as none lost; so 4 is
    the default here. Missing: 3 bits, and important tokens in 4 bits, which the paper also has; here they stay in the
    dtype of the model. Heads that share keys share what is important and the largest query magnitude (the paper's
    models have none). ``positions()`` and ``report()`` show important tokens; demoted ones count as dropped there,
    since they have lost their slots, but ``nbytes()`` counts their bytes.
    """
    keep = Evict(AttentionReceived(), read_budget(budget), recent_share(recent), burst=burst)
    return Method(keep=keep, store=TwoPrecisions(low_bits, group, balancer))
