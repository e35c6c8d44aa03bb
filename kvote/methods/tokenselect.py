"""TokenSelect: dynamic token-level KV cache selection (Wu et al., EMNLP 2025, arXiv 2411.02886)."""

from kvote.errors import MethodError
from kvote.method import Method, published
from kvote.read.head_votes import HeadVotes
from kvote.tokens import Positions


@published(rooms="read", source="Wu et al. 2024, arXiv 2411.02886", needs="rotary positions")
def tokenselect(
    top_k: int = 2048,
    sinks: int = 128,
    window: int = 512,
    chunk: int = 512,
    tail: int | None = None,
    theta: float = 0.9,
    reuse_span: int | None = None,
    max_pool: int = 0,
    head_map: str | None = None,
    selection: str = "soft_vote",
    sketch: str = "none",
    positions: Positions = "contiguous",
    tensor_parallel: bool = False,
    published: bool = False,
) -> Method:
    """Reads sinks, a window and the tokens that win a vote of all heads; keeps everything.

    A query scores all candidates with un-rotated keys (position 0), every head spreads one vote over them by its
    softmax, and the ``top_k`` tokens with the most votes are read besides the first ``sinks`` and the last ``window``
    tokens, at contiguous new positions: no position exceeds the length of the list, so a model reads texts far
    longer than those it was trained on. Texts that fit into the list are read whole.

    ``chunk``: queries of a prompt that share one selection, made with their average. ``tail``: the last tokens of
    every prompt or turn, which select one by one; None is 40 (a question that is averaged with the text before it
    finds nothing). ``theta``: a decode step whose query has at least this cosine with the one that last selected
    reuses its tokens, for up to ``reuse_span`` steps (None: 32); a theta of more than 1 selects anew each step.
    ``max_pool``: spreads votes to neighbours. ``head_map``: 'gqa' (None) scores each query head against its own key
    head; 'paper' pairs head h with key head h mod (number of key heads). ``selection``: 'soft_vote', or the
    ablations 'head_vote' and 'logit_sum'. ``sketch``: what a query scores
    with: 'none', the keys themselves; 'int8', 8-bit copies (half the bytes of bfloat16 keys); 'int4', 4-bit copies (a
    quarter), which only nominate four times as many tokens as are read, or 4,096, to be scored again with their keys.
    Sketches need compiled kernels (CPU or GPU) and cost their bytes on top; elsewhere the keys are read. ``positions``:
    'original' keeps the text's own positions. ``tensor_parallel``: heads are split over the ranks of
    torch.distributed, and votes are summed across them. ``published``: True is the rule as it was published, for
    comparison.

    Differs from the paper and its code, unless it is the published rule: the last tokens of a prompt select one by one;
    the window reaches back from the start of a chunk, not from its end, so that the first tokens of a chunk see their
    neighbours too; a reused list serves a limited span of steps and also reads what has left the window since; and
    heads are paired as in attention. ``published=True`` has ``tail`` 0, the window from the end of a chunk (it must be
    at least as long), a selection reused for as long as the cosine allows, and ``head_map='paper'``; of these, ``tail``
    and ``head_map`` may still be given. In either case votes are added in float32 (the code's: bfloat16), chunks are
    cut at multiples of ``chunk`` in the text, or where a pass ends, and smoothing (``max_pool``), which the code sets
    for each of its data sets, is off unless given.
    """
    _check_published(published, reuse_span)
    reader = HeadVotes(
        top_k=top_k,
        sinks=sinks,
        window=window,
        chunk=chunk,
        tail=(0 if published else 40) if tail is None else tail,
        theta=theta,
        reuse_span=32 if reuse_span is None and not published else reuse_span,
        max_pool=max_pool,
        head_map=("paper" if published else "gqa") if head_map is None else head_map,
        selection=selection,
        sketch=sketch,
        positions=positions,
        tensor_parallel=tensor_parallel,
        window_from="end" if published else "start",
    )
    return Method(read=reader)


def _check_published(published: bool, reuse_span: int | None) -> None:
    """Raises MethodError for a switch that is none, or a span that the published rule does not have."""
    if not isinstance(published, bool):
        raise MethodError(f"published must be True or False; got {published!r}.")
    if published and reuse_span is not None:
        raise MethodError("published=True reuses a selection for as long as its query allows; leave reuse_span out.")
