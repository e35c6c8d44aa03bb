"""CRITIC: cache reduction by hybrid importance (in: Scaling Test-Time Inference with Policy-Optimized, Dynamic
Retrieval-Augmented Generation via KV Caching and Decoding; Sakhinana et al., 2025, arXiv 2504.01281)."""

from dataclasses import replace

from kvote.errors import MethodError
from kvote.keep.allocate.allocation import Even
from kvote.keep.allocate.memory_pressure import MemoryPressure
from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.score.hybrid import Hybrid
from kvote.method import Method, published
from kvote.numbers import is_whole


@published(rooms="keep", source="Sakhinana et al. 2025, arXiv 2504.01281")
def critic(
    budget: int | float | str = 0.7,
    attention: float = 0.5,
    entropy: float = 0.2,
    gradient: float = 0.3,
    least: int = 128,
    burst: int = 16,
    memory: str | None = None,
    alpha: float = 0.3,
    most: float = 0.6,
    sinks: int = 0,
    recent: int = 1,
) -> Method:
    """Keeps tokens by attention received, entropy of the attention they paid, and gradients of what was answered last.

    Each part is stretched to 0 to 1 over the tokens held; ``attention``, ``entropy`` and ``gradient`` are their weights
    and add up to 1. The gradient is that of the squared distance between the last two answers of the layer, with
    respect to keys and values; its L1 norms have a closed form, so nothing is differentiated. A token that attended
    widely stays sooner: that is the stated sign. All heads of a layer keep the same tokens.

    ``budget``: tokens kept, as a number, a fraction of the tokens seen or bytes; fractions keep ``least`` tokens at
    least. ``burst``: so many generated tokens go at once. ``sinks`` and ``recent``: first and last tokens that stay
    whatever they are worth. ``memory``, such as "8GiB": with a budget that is a fraction, the share that goes grows by
    ``alpha`` times the part of it that tokens fill, up to ``most``; None: it does not.

    No code was published. Differs from the text: attention is what a token received (the text adds up what it paid,
    which is the same for all); the share is of the tokens seen (there: of those held, after every token, so that a
    cache shrinks to ``least`` whatever the ratio); a burst is below the budget, not above it; the newest token always
    stays; for the first query of all, which has no answer before it, the other parts count alone. Weights, ``least``,
    ``alpha`` and ``most`` are not in the paper and kvote's choice; its ratios go from 0.1 to 0.5 (budgets from 0.9 to
    0.5). Missing: the training and the retrieval of the same paper.
    """
    for name, value in (("least", least), ("sinks", sinks), ("recent", recent)):
        if not is_whole(value):
            raise MethodError(f"{name} must be a whole number; got {value!r}.")
    limit, always = read_budget(budget), sinks + recent
    if limit.unit == "fraction":
        limit = replace(limit, least=max(least, always + 1))
    allocate: Even | MemoryPressure = Even()
    if memory is not None:
        total = read_budget(memory)
        if limit.unit != "fraction" or total.unit != "bytes":
            raise MethodError(
                f'memory must be bytes such as "8GiB", with a budget that is a fraction, which it makes smaller; got '
                f"memory={memory!r} and budget={budget!r}."
            )
        allocate = MemoryPressure(1 - limit.amount, alpha, most, total.amount, limit.least, always)
    score = Hybrid(attention=attention, entropy=entropy, gradient=gradient)
    return Method(keep=Evict(score, limit, recent, sinks, burst=burst, allocate=allocate))
