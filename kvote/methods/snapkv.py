"""SnapKV: LLM Knows What You are Looking for Before Generation (Li et al., NeurIPS 2024, arXiv 2404.14469)."""

from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.score.last_queries import LastQueries
from kvote.method import Method, published


@published(rooms="keep", source="Li et al. 2024, arXiv 2404.14469")
def snapkv(
    budget: int | float | str = 2048,
    window: int = 32,
    kernel: int = 5,
    pooling: str = "avg",
    per_head: bool = True,
) -> Method:
    """Keeps what the last queries of a prompt look at, and the last tokens themselves; what is generated stays.

    At the end of a prompt, the attention of its last ``window`` queries to every earlier token is added up in each
    query head, pooled over ``kernel`` neighbours so that what surrounds a hit stays too, and added up over the query
    heads of a key head; the tokens with the most of it are kept besides the window. Prompts that fit into the budget
    are kept whole. The prompt itself is read in full, so its logits are exact. Tokens generated afterwards are added
    and stay. When a conversation goes on, its next turn is a prompt again: its last queries vote on all that is held
    then.

    ``budget``: tokens kept, the window among them, as a number (1024), a fraction of the tokens seen (0.25) or bytes
    ("512MiB"; what is generated comes on top). ``pooling``: 'avg', as the published code, or 'max'. ``per_head``: every
    key head keeps its own tokens; with False all keep the same, by the sum over heads, which readers such as
    ``tokenselect`` need.

    The end of every pass counts as a prompt's end, unless ``Cache.expect`` announced a prompt in several passes; a
    turn shorter than the window votes with the queries it has. A question must end the prompt for the vote to know it:
    a ``Document`` is cut down before it is asked. Heads that share keys vote together and keep one set of tokens (the
    published code repeats the keys for every query head first, and each chooses its own). Tokens stay in the text's
    order. Attention is added up in float32 (published: weights are rounded to the model's dtype first).
    """
    score = LastQueries(window=window, kernel=kernel, pooling=pooling, per_head=per_head)
    return Method(keep=Evict(score, read_budget(budget), window, evict_generated=False))
