"""LoopServe: an adaptive dual-phase LLM inference acceleration system for multi-turn dialogues (Li et al., 2025)."""

from kvote.method import Method, published
from kvote.read.sparse_turns import SparseTurns


@published(rooms="read", source="Li et al. 2025, arXiv 2507.13681")
def loopserve(
    alpha: float = 0.955,
    top_k: int = 1024,
    every: int = 16,
    window: int = 32,
    kernel: int = 5,
    last: int = 64,
    sample: int = 64,
    block: int = 64,
    seed: int = 0,
) -> Method:
    """Prompts read columns and diagonals on which sampled queries look; answers choose anew what they read of a prompt.

    Of a turn's new tokens, the ``last`` and ``sample`` others, drawn by ``seed``, show where each query head looks:
    greedily, the columns (tokens) and diagonals (distances) that cover the most of their attention not covered yet are
    taken, until they cover the share ``alpha``; always the diagonal of the tokens themselves. All queries of the turn
    read the tokens on these lines. ``alpha=1``, or a turn that is no longer than the sample: everything is read.

    The first token of an answer, and then every ``every``-th, chooses ``top_k`` tokens of all that came before the
    answer for each query head: those with the most attention from the last ``window`` queries of the turn, and later
    from the last ``every`` queries of the answer. Answers read what was chosen, and all of themselves. Everything is
    kept, so the next turn looks at all of it.

    After the paper's description; no code is published. Its sizes of sample and window are not known, nor whether votes
    are pooled: here over ``kernel`` neighbours, as in SnapKV. kvote's own: queries are answered in blocks (at multiples
    of ``block``), which read what lies on a line of any of them, and themselves whole; all heads read as many tokens as
    the one whose lines have most, the others the best columns besides; from eight lines on, an eighth of those taken so
    far is taken at a time. Query heads that share keys choose for themselves. A pass is a turn of its own for the
    lines, so prompts in several passes read other tokens than in one. Drafts of assisted decoding count as a turn.

    What chose cannot be brought back: without ``activate_past_recording`` a rollback is refused, and methods that drop
    tokens are, beside it. Missing: kernels that make the sparse prompt fast; here it costs more than it saves.
    """
    return Method(read=SparseTurns(alpha, last, sample, block, top_k, every, window, kernel, seed))
