"""PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation (Wang et
al., NeurIPS 2025, arXiv 2412.03409)."""

from kvote.keep.allocate.same_share import SameShare
from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.score.prompt_attention import PromptAttention
from kvote.method import Method, published


@published(rooms="keep", source="Wang et al. 2024, arXiv 2412.03409")
def prefixkv(budget: int | float | str = 0.5, sinks: int = 1, distance: int = 25) -> Method:
    """Keeps in each layer the fewest tokens with the same share of its attention, one share for all layers.

    A token is worth the attention that it receives from all queries of a prompt, over all heads; all heads of a layer
    keep the same tokens. Once all layers have read a prompt, one bisection finds the share of its attention that every
    layer keeps, so that all together hold the budget: layers whose attention is peaked hold fewer tokens. The first
    ``sinks`` tokens and the last one stay besides. Generating, a layer that is above its budget drops the token
    ``distance`` tokens before where the prompt ended in it, by place and not by worth.

    ``budget``: tokens kept per layer on average, as a number, a fraction of the tokens seen or bytes (the paper studies
    0.1 to 0.9); a fraction goes on growing with the text. What goes is rounded down, so a layer may hold a token more,
    except of a budget in bytes.

    Differs from the published code: the search is made for each prompt, where the code makes it for ten samples and
    keeps the means in a file per budget, so nothing is calibrated, but all layers hold a prompt whole until the last
    has read it; a generated token stands at its own position (there: at the length of the first layer); rows of a batch
    are divided each by itself; query heads that share keys are added up (no such models there). Missing: budgets of
    layers that are read from a file.
    """
    limit = read_budget(budget)
    share = SameShare(sinks, 1, limit.unit == "fraction")
    return Method(keep=Evict(PromptAttention(distance=distance), limit, 1, sinks, burst=1, allocate=share))
