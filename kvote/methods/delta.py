"""DELTA: dynamic layer-aware token attention (Entezari Zarch et al. 2025, arXiv 2510.09883)."""

from kvote.method import Method, published
from kvote.read.page_plan import PagePlan


@published(rooms="read", source="Entezari Zarch et al. 2025, arXiv 2510.09883")
def delta(full: tuple[int, ...] | None = None, pages: int = 64, recent: int = 8, page: int = 16) -> Method:
    """Generated tokens read everything in a few layers and, in those after, the pages that were attended to most there.

    ``full``: the layers, counted from 0, that read everything. One of them that is followed by a layer that is not
    among them also chooses: a token is worth the largest softmax weight that any query head gives it, a page of
    ``page`` tokens the sum of that, and the ``pages`` best pages are read, exactly and at their own positions, by all
    heads of the layers up to the next one that reads everything. The last ``recent`` pages are always among them and
    count. Choices are made anew with every token; everything is kept. None takes layers 0, 1, 2, 14 and 22 of 28, as
    published, and as deep in other models, without the last layer; which layers are best depends on the model.
    Of hybrid models, only layers with full attention are counted, and only they share pages.

    Texts within ``pages`` * ``page`` tokens, prompts, further turns and drafts of assisted decoding (a pass of several
    tokens, or one that ``Cache.expect`` announced) are read whole.

    Differs from the published code: whether a text is long enough is asked of each sequence, not of the batch (the
    published ``compression_ratio`` of 1, which decides that, is fixed); pages of equal worth are ranked by the kernel
    (the C++ one takes the earlier), without the published bias of 1e-7 per page, which at 10,000 pages outweighs real
    differences. A learned sink of a model takes no part in the weights. Pages count the tokens that are held.

    Missing: the page tables and graphs of the published GPU engine; pages are read token by token by the kernel for
    lists, and layers that choose compute their products twice.
    """
    return Method(read=PagePlan(full, pages, recent, page))
