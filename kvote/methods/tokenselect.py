"""TokenSelect: dynamic token-level KV cache selection (Wu et al., EMNLP 2025, arXiv 2411.02886)."""

from kvote.method import Method, published
from kvote.read.head_votes import HeadVotes
from kvote.read.tokens import Positions


@published(rooms="read", source="Wu et al. 2024, arXiv 2411.02886", needs="rotary positions")
def tokenselect(
    top_k: int = 2048,
    sinks: int = 128,
    window: int = 512,
    chunk: int = 512,
    tail: int = 40,
    theta: float = 0.9,
    reuse_span: int = 32,
    max_pool: int = 0,
    head_map: str = "gqa",
    selection: str = "soft_vote",
    sketch: str = "none",
    positions: Positions = "contiguous",
    tensor_parallel: bool = False,
) -> Method:
    """Reads sinks, a window and the tokens that win a vote of all heads; keeps everything.

    A query scores all candidates with un-rotated keys (position 0), every head spreads one vote over them by its
    softmax, and the ``top_k`` tokens with the most votes are read besides the first ``sinks`` and the last ``window``
    tokens, at contiguous new positions: no position exceeds the length of the list, so a model reads texts far
    longer than those it was trained on. Texts that fit into the list are read whole.

    ``chunk``: queries of a prompt that share one selection, made with their average. ``tail``: the last tokens of
    every prompt or turn, which select one by one (not in the paper; a question that is averaged with the text before
    it finds nothing). ``theta``: a decode step whose query has at least this cosine with the one that last selected
    reuses its tokens, for up to ``reuse_span`` steps; more than 1 selects anew each step. ``max_pool``: spreads
    votes to neighbours. ``head_map``: 'gqa' scores each query head against its own key head; 'paper' pairs head h
    with key head h mod (number of key heads), as the published code does. ``selection``: 'soft_vote', or the
    ablations 'head_vote' and 'logit_sum'. ``sketch``: what a query scores
    with: 'none', the keys themselves; 'int8', 8-bit copies (half the bytes of bfloat16 keys); 'int4', 4-bit copies (a
    quarter), which only nominate four times as many tokens as are read, or 4,096, to be scored again with their keys.
    Sketches need compiled kernels (CPU or GPU) and cost their bytes on top; elsewhere the keys are read. ``positions``:
    'original' keeps the text's own positions. ``tensor_parallel``: heads are split over the ranks of
    torch.distributed, and votes are summed across them.

    Differs from the published code: the window reaches back from the start of a chunk, not from its end, so that the
    first tokens of a chunk see their neighbours too; and a reused list also reads what has left the window since.
    """
    reader = HeadVotes(
        top_k=top_k,
        sinks=sinks,
        window=window,
        chunk=chunk,
        tail=tail,
        theta=theta,
        reuse_span=reuse_span,
        max_pool=max_pool,
        head_map=head_map,
        selection=selection,
        sketch=sketch,
        positions=positions,
        tensor_parallel=tensor_parallel,
    )
    return Method(read=reader)
