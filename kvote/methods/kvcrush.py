"""KVCrush: key value cache size-reduction using similarity in head-behaviour (Jha et al., ACML 2025)."""

from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.representatives import Representatives
from kvote.keep.score.last_queries import LastQueries
from kvote.method import Method, published


@published(rooms="keep", source="Jha et al. 2025, arXiv 2503.00022")
def kvcrush(
    budget: int | float | str = 2048,
    crush: float = 0.25,
    anchor: str = "random",
    seed: int = 0,
    window: int = 32,
    kernel: int = 5,
    pooling: str = "avg",
) -> Method:
    """Keeps what the last queries of a prompt look at, and representatives of what would go; what is generated stays.

    Tokens are judged as in ``snapkv``, which says what ``budget``, ``window``, ``kernel`` and ``pooling`` are. Of what
    a key head keeps besides the window, the share ``crush`` are representatives: each key head marks with a bit the
    half of the tokens that it ranks highest; the bits of all key heads are a token's signature; tokens that the head
    would drop are put in the order of how many bits of it differ from an ``anchor``, and so many of them, evenly
    spaced, stay. 0 is ``snapkv``. ``anchor``: 'random' (by ``seed``), 'zeros', 'ones' or 'alternating' bits.
    Representatives stand for themselves: nothing is merged into them.

    Representatives count within the budget, as in the paper (in OpenVINO they come on top). Differs from the published
    code: single tokens, where that takes pages of 16 whose signatures are those of their tokens, over heads (vLLM) or
    over tokens with heads merged (OpenVINO); each head has representatives among what it would drop itself (vLLM: the
    same for all, among what the first head drops). The paper's grouping was not read in full: even spacing is that of
    both codes. Missing: the anchor 'mean', which is 'zeros' where exactly half of the bits of a head are set; other
    methods than ``snapkv`` as the base; eviction while generating.
    """
    score, limit = LastQueries(window=window, kernel=kernel, pooling=pooling), read_budget(budget)
    choose = Representatives(crush, anchor, seed)
    return Method(keep=Evict(score, limit, window, evict_generated=False, choose=choose))
