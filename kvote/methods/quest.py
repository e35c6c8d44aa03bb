"""Quest: query-aware sparsity for efficient long-context LLM inference (Tang et al., ICML 2024, arXiv 2406.10774)."""

from kvote.method import Method, published
from kvote.read.best_pages import BestPages


@published(rooms="read", source="Tang et al. 2024, arXiv 2406.10774")
def quest(token_budget: int = 2048, page: int = 16, dense_layers: int = 2) -> Method:
    """Generated tokens read the pages whose key bounds promise the highest scores; keeps everything.

    Of every ``page`` tokens, a key head holds the minimum and maximum of each channel of its keys as the model rotated
    them (with 16 tokens, an eighth of the keys' bytes on top). With a query, these bound every score inside the page.
    A query head reads the newest page and those with the highest bounds, max(3, ``token_budget`` // ``page``) pages
    together, all their tokens exactly and at their own positions. The first ``dense_layers`` layers read everything and
    hold no bounds. ``page`` must divide 64.

    Texts within the budget, prompts, further turns and drafts of assisted decoding (any pass of several tokens, and any
    that ``Cache.expect`` announced) are read whole.

    Differs from the published code: the newest page, which may be partly filled, is always read and counts in the
    budget, as in the published GPU kernels; in the published model code it competes with the others. The minimum and
    maximum lie once per key head, not once per query head. Pages count the tokens that are held: joined with a method
    that drops tokens, the tokens that are left close up and are bounded anew. Published budgets are 256 to 4,096.

    Missing: fused kernels. Bounds are computed and scored by torch, in float32 as in the published code, pages are read
    by the kernel for lists, token by token, and query heads of one key head each read their own.
    """
    return Method(read=BestPages(token_budget, page, dense_layers))
