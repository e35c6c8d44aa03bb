"""InfLLM: long-context extrapolation with a context memory (Xiao et al., NeurIPS 2024, arXiv 2402.04617)."""

from kvote.method import Method, published
from kvote.read.far_blocks import FarBlocks


@published(rooms="read", source="Xiao et al. 2024, arXiv 2402.04617", needs="rotary positions")
def infllm(
    block: int = 128, sinks: int = 128, window: int = 4096, top_k: int = 16, representatives: int = 4, chunk: int = 512
) -> Method:
    """Reads sinks, a window, and of what lies behind it the blocks whose representatives match; keeps everything.

    Tokens that the last ``window`` of a query have left behind form blocks of ``block``. A block has one vector per
    query head: the mean of those ``representatives`` of its keys that received the most attention from that head while
    they were in the window, keys as they are without rotation. ``chunk`` queries of a prompt, or a generated token,
    read the ``top_k`` blocks whose vectors have the largest product with the mean of the queries, summed over all
    heads; also the first ``sinks`` tokens, and those behind the window that fill no block yet. All that is far stands
    at one distance, ``window``, from every query, in no order; the window at its own distances. No position exceeds
    ``window``, so a model reads texts far longer than those it was trained on. Texts within ``sinks`` + ``window``
    tokens are read whole.

    Differs from the published code: the first ``sinks`` + ``window`` queries see the first tokens at their own
    distances, where the code moves them to the one distance as soon as they leave the window; chunks are cut at
    multiples of ``chunk`` in the text, or where a pass ends, and prompts are not cut in pieces of 8,192 before.

    What was added up cannot be taken apart: without ``activate_past_recording`` a rollback is refused.

    Missing: blocks in host memory with a cache of 32 on the GPU; all tokens stay where the model's keys are, so that
    memory grows with the text. Methods that drop tokens are refused beside it.
    """
    return Method(read=FarBlocks(block, sinks, window, top_k, representatives, chunk))
