"""Keyformer: KV cache reduction through key tokens selection (Adnan et al., MLSys 2024, arXiv 2403.09054)."""

from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict, recent_share
from kvote.keep.score.noised import NoisedAttention
from kvote.method import Method, published


@published(rooms="keep", source="Adnan et al. 2024, arXiv 2403.09054")
def keyformer(
    budget: int | float | str = 0.6,
    recent: float = 0.3,
    tau: float = 1.0,
    tau_end: float = 2.0,
    steps: int = 100,
    noise: bool = True,
    seed: int = 0,
    per_head: bool = True,
    burst: int | None = None,
) -> Method:
    """Keeps the tokens with the most attention received under Gumbel noise and a rising temperature, and recent ones.

    Every token adds up softmax((logits + noise) / temperature) over the tokens that each query reads, for as long as it
    is held; attention itself stays without noise. After each pass the tokens with the largest sums among those that are
    not recent stay. Noise is drawn anew for each layer, query head, query and key. The temperature is ``tau`` for a
    prompt and rises with every token generated after it, to ``tau_end`` after ``steps`` of them, where it stays.

    ``budget``: tokens kept, as a number, a fraction of the tokens seen or bytes. ``recent``: the share of it that is
    for recent tokens (the paper recommends 0.2 to 0.3). ``noise=False``, ``tau=1`` and ``tau_end=1`` is ``h2o``.
    ``noise``: whether it is drawn at all. ``seed``: of it. ``per_head``, ``burst``: as in ``h2o``; ``burst=1`` is one
    token per step, as in the paper.

    This is the paper's rule: a token that leaves the recent ones can become a key token. In the published code it is
    lost, so that the key tokens of the prompt stay as they are. Also differs from the code: a fraction follows the text
    as it grows (there it is fixed at the prompt); ``steps`` is a number of its own (there: the tokens to generate),
    with 100 as the code's configuration has it; key tokens are rounded down, not recent ones; a later turn goes on with
    the sums, and its temperature starts again; sequences of a batch are kept apart (there their sums are one), with the
    same noise at the same positions, so that none depends on its neighbours; query heads that share keys are added up
    (no such models there). Noise takes time by the square of a prompt's length. Missing:
    selection in blocks of eight steps, of which ``burst`` is another form.
    """
    score = NoisedAttention(tau=tau, tau_end=tau_end, steps=steps, noise=noise, seed=seed, per_head=per_head)
    return Method(keep=Evict(score, read_budget(budget), recent_share(recent), burst=burst))
