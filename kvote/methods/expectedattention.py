"""Expected Attention: KV cache compression by estimating attention from future queries distribution (Devoto et al.)."""

from kvote.keep.allocate.over_heads import CompetingHeads
from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.score.expected import ExpectedQueries
from kvote.method import Method, published


@published(rooms="keep", source="Devoto et al. 2025, arXiv 2510.00636", needs="the model's rotation")
def expectedattention(
    budget: int | float | str = 0.5,
    sinks: int = 4,
    future: int = 512,
    covariance: bool = True,
    values: bool = True,
    epsilon: float = 0.0,
    safeguard: float = 0.2,
    per_head: bool = True,
) -> Method:
    """Keeps what queries to come are expected to attend to, if they are like the prompt's; what is generated stays.

    At the end of a prompt, mean and covariance of its queries without rotation are turned by the mean rotation of the
    next ``future`` positions. The attention that queries of that normal distribution pay to a key has a closed form;
    it is normalised over the tokens held, averaged over the query heads of a key head, and multiplied by the norm of
    the value. The ``sinks`` first tokens stay and count for nothing; besides them stay the largest. No attention is
    looked at, so a question need not be known. The tokens of all key heads of a layer compete, as in ``adakv``: a head
    keeps as many as it has among the best. When a conversation goes on, its next turn is a prompt again, and all
    that is held is judged by its queries.

    ``budget``: tokens kept, sinks among them, as a number (1024), a fraction of the tokens seen (0.25) or bytes
    ("512MiB"; what is generated comes on top). ``covariance``: False takes the mean query alone; ``values``: whether
    the norm of the value counts; ``epsilon``: added to the expected attention before that. ``safeguard``: the share of
    the budget that is divided over key heads evenly first; with 1 all keep equally many. ``per_head``: every key head
    keeps its own tokens; with False all keep the same, by the sum over heads, which readers such as ``tokenselect``
    need.

    Differs from the published code (kvpress): the newest token always stays, tokens stay in the text's order, the
    scale of logits is the model's own, a soft cap on them is left out, and the statistics of a prompt in several
    announced passes are of all of it. Heads compete by default, for which kvpress wraps it in its AdaKV, with what it
    adds to expected attention there (``epsilon=0.01``). Missing: compression while generating.
    """
    score = ExpectedQueries(
        sinks=sinks, future=future, covariance=covariance, values=values, epsilon=epsilon, per_head=per_head
    )
    joint = CompetingHeads(safeguard)
    heads = joint if per_head and safeguard < 1 else None
    return Method(keep=Evict(score, read_budget(budget), sinks=sinks, evict_generated=False, over_heads=heads))
