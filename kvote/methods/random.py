"""Random tokens: the baseline of arXiv 2609.03430. A selection that does not beat it at equal size is worth nothing."""

from kvote.method import Method, published
from kvote.read.random_tokens import RandomTokens


@published(rooms="read", source="baseline (arXiv 2609.03430)", needs="rotary positions")
def random(
    top_k: int = 2048, sinks: int = 128, window: int = 512, chunk: int = 512, tail: int = 40, seed: int = 0
) -> Method:
    """Reads sinks, a window and as many random tokens as TokenSelect selects; keeps everything.

    Parameters as in ``tokenselect``; ``seed`` decides the draws, which depend on nothing else but layer and position.
    """
    reader = RandomTokens(
        top_k=top_k,
        sinks=sinks,
        window=window,
        chunk=chunk,
        tail=tail,
        theta=2.0,
        reuse_span=1,
        max_pool=0,
        head_map="gqa",
        selection="soft_vote",
        sketch="none",
        positions="contiguous",
        tensor_parallel=False,
        seed=seed,
    )
    return Method(read=reader)
