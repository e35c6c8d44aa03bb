"""Oracle: the tokens with the most true attention. The ceiling of selection at equal size; it saves no time."""

from kvote.method import Method, published
from kvote.read.oracle import MostMass


@published(rooms="read", source="baseline")
def oracle(top_k: int = 2688, tail: int = 40) -> Method:
    """A baseline: every query head reads the ``top_k`` tokens that it attends to most; keeps everything.

    Scores are those of the keys themselves, where they stand, so sinks and neighbours are read as far as they have
    attention. Prompts are read whole up to their last ``tail`` tokens, which choose one by one, as generated ones do: a
    model that fails on a text longer than it was trained on still does.

    ``top_k``: tokens that each query head reads. ``tail``: last tokens of a prompt that choose one by one.
    """
    return Method(read=MostMass(top_k, tail))
