"""TIM: beyond context limits, subconscious threads for long-horizon reasoning (Luo et al., 2025, arXiv 2507.16784)."""

from kvote.keep.subtasks import Subtasks
from kvote.method import Method, published
from kvote.read.contiguous import Contiguous


@published(rooms="keep, read", source="Luo et al. 2025, arXiv 2507.16784", needs="token ids or marks; rotary positions")
def tim(
    opens: tuple[int, ...] = (), closes: tuple[int, ...] = (), threshold: int = 2, mark: str = "subtasks"
) -> Method:
    """Drops the lists of subtasks that have ended, but the last few; positions go on as if they had never been there.

    A list begins behind a token of one of the ids ``opens`` and ends before the one of ``closes`` that belongs to it;
    both stay, so the text stays well-formed, and so does all that is outside of lists: thoughts and conclusions. Lists
    may lie in lists. Without ids, a list is a span of the name ``mark`` (``cache.mark_span``), and ends with the first
    token behind. Once more than ``threshold`` lists that hold something have ended, the one that ended first goes, in
    all layers and heads, in prompts (when they have ended) as in what is generated. Tokens held are read at the
    positions 0, 1, 2, ..., so neither memory nor positions bound the length of a text.

    What came behind a list was computed while it could be seen. ``kvote.subtasks.encode_again(model, cache)`` feeds
    that once more, in one pass, as the paper's engine does after every list that goes; then the cache is that of the
    text without it. ``generate(..., logits_processor=[kvote.subtasks.EncodesAgain(model, cache)])`` does so by itself.
    Without either, what follows still knows of what is gone (the ablation of the paper's design).

    After the paper's description; its engine is not published. Which ids open and close lists is the caller's to say: a
    bracket within a word or a string counts as well. Batches are pruned row by row, but encoded again for one
    sequence only. A budget there is none: what is held is bounded by the depth of the tree. Keys are held without
    rotation.

    Missing: the model trained to write task trees, without which nothing is known about answers; decoding under the
    grammar of the tree; calling tools (their results can be fed in one pass).
    """
    return Method(keep=Subtasks(opens, closes, threshold, mark), read=Contiguous())
