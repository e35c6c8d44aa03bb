"""ActQKV: activation-aware probe-query for effective key-value retrieval (Xiao et al., 2025, arXiv 2502.13542)."""

from kvote.method import Method, published
from kvote.read.probed_blocks import ProbedBlocks


@published(rooms="read", source="Xiao et al. 2025, arXiv 2502.13542", needs="rotary positions")
def actqkv(
    block: int = 32,
    sinks: int = 64,
    window: int = 512,
    top_k: int = 46,
    representatives: int = 4,
    chunk: int = 256,
    least: int = 32,
    ramp: int = 1000,
    warm: int = 100,
) -> Method:
    """Reads sinks, a window and blocks as infllm does, chosen by a probe in which unusual queries count more.

    ``block``, ``sinks``, ``window``, ``representatives`` and ``chunk`` are those of ``infllm``, of which this changes
    how blocks are scored and how many are read. A chunk of queries asks with their weighted sum: a query's weight is
    its mean squared deviation from what the layer's queries have been, each channel's measured by its variance; until
    ``ramp`` chunks have passed, counted over all layers, weights are equal. A block's score is the cosine of that probe
    with what represents it, over all heads at once. A chunk of a prompt reads ``top_k`` blocks. For a generated token
    the layers share ``top_k`` blocks for each: a layer's share of what those before it have left is that of the mean
    entropy of its last ``warm`` scores (softmax over blocks, divided by the logarithm of their number) among it and the
    layers after it; before there are ``warm`` of every layer, all read ``top_k``. No layer reads fewer than ``least``
    blocks, as long as there are so many, nor more than twice ``top_k``.

    Differs from the published code: statistics of queries are kept per layer and sequence and begin anew with every
    cache (the code has one set for all layers and all requests); only chunks that choose blocks are counted; ``infllm``
    says what else differs of the blocks. ``ramp`` chunks over all layers are the code's thousand updates. After an
    announced rollback a chunk of a prompt that was cut in the middle is not counted.

    Missing: the second term of a prompt's scores, four times the cosine with the question, which is not known there;
    blocks in host memory. Methods that drop tokens are refused beside it.
    """
    return Method(read=ProbedBlocks(block, sinks, window, top_k, representatives, chunk, least, ramp, warm))
