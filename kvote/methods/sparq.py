"""SparQ Attention: bandwidth-efficient LLM inference (Ribar et al., ICML 2024, arXiv 2312.04985)."""

from kvote.method import Method, published
from kvote.read.few_channels import FewChannels


@published(rooms="read", source="Ribar et al. 2023, arXiv 2312.04985")
def sparq(rank: int = 32, top_k: int = 128, local: int = 32) -> Method:
    """Generated tokens score the text by their own largest channels; a mean of values stands for what is not read.

    ``rank``: channels of the query, those with the largest sum of absolute values over the query heads of a key head,
    that meet the same channels of all keys; more than a head has are all of them. Divided by the square root of the
    share of the query's absolute values that lies in these channels, the products estimate the logits of all tokens. A
    key head reads its own token and the ``top_k`` tokens before it with the largest sum of estimates over its query
    heads, the last ``local`` always among them, exactly and at their own positions. The mean of all values held, the
    token's own included, is added with the share of the estimated softmax that the tokens not read have. Keeps
    everything.

    Texts within ``top_k`` + 1 tokens, prompts, further turns and drafts of assisted decoding (any pass of several
    tokens, and any that ``Cache.expect`` announced) are read whole.

    Differs from the published code: the running mean of values is had from sums of 64 tokens each, so that it follows
    rollbacks, copies and dropped tokens (it is the mean of the tokens that are held); a model's own scale and soft cap
    take the place of 1 / sqrt(d); a learned sink of a model takes part in the final softmax, not in the estimate. The
    paper's ranks are 16 to 64 of 128 channels.

    Missing: the second copy of the keys, channel by channel. Estimates here read all channels of the keys, so time and
    traffic saved are those of values and of exact attention only.
    """
    return Method(read=FewChannels(rank, top_k, local))
