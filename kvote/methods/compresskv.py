"""CompressKV: semantic retrieval heads know what tokens are not important before generation (Lin et al., 2025)."""

from kvote.calibration.file import Calibration, command
from kvote.calibration.file import load as load_calibration
from kvote.calibration.spans import SEMANTIC, best_heads, facts_of
from kvote.errors import MethodError
from kvote.keep.allocate.importance import ByImportance
from kvote.keep.budget import budget as read_budget
from kvote.keep.evict import Evict
from kvote.keep.score.chosen_heads import ChosenHeads
from kvote.method import Method, published
from kvote.numbers import is_whole


@published(rooms="keep", source="Lin et al. 2025, arXiv 2508.02401", needs="calibrated heads (`kvote calibrate`)")
def compresskv(
    heads: str | Calibration | None = None,
    budget: int | float | str = 1024,
    first_k: int = 4,
    window: int = 8,
    kernel: int = 5,
    least: int = 32,
    most: int = 3,
) -> Method:
    """Keeps what a few heads of each layer look at that find answers; layers that lose more by it keep more.

    ``heads``: file that `kvote calibrate --what semantic` wrote for this model, or what it holds. Of each layer, the
    ``first_k`` query heads with the highest span scores vote: the attention of the last ``window`` queries of a prompt,
    pooled over ``kernel`` neighbours. All heads of the layer keep the tokens with the most votes, and the window; what
    is generated stays. Layers divide the ``budget``, which is the mean over them, by the error that was measured with
    32 tokens each: every layer has ``least`` tokens, and ``most`` times the mean at most.

    Span scores: while a model gives an answer, a head's attention to the whole of what says it in the text, as often as
    the token given is in that; the mean over texts that the model answers.

    Differs from the published code: answers are fed and not generated, and count where the model would have given more
    than half; texts are of the model's own calibration text (the code measures errors on LongBench, which it is then
    tested on), fewer, and as long as asked for; errors are of attention before its projection, in a pass that is whole
    otherwise, and normalised over all texts together. Layers divide what they keep of a prompt at its end each for
    itself. Small models have fewer heads that find anything: choose ``first_k`` by it.
    """
    if heads is None:
        raise MethodError(
            f"compresskv needs to know this model's heads: run {command(SEMANTIC)} once, and write "
            "compresskv(heads='FILE')."
        )
    if not isinstance(heads, str | Calibration):
        raise MethodError(f"heads must be the name of a file; got {heads!r}.")
    if not is_whole(first_k) or first_k < 1:
        raise MethodError(f"first_k must be a whole number of at least 1; got {first_k!r}.")
    calibration = load_calibration(heads, SEMANTIC) if isinstance(heads, str) else heads
    spans, errors = facts_of(calibration)
    chosen = tuple((layer, best_heads(spans[layer], first_k)) for layer in sorted(spans))
    score = ChosenHeads(heads=chosen, window=window, kernel=kernel)
    allocate = ByImportance(tuple(errors[layer] for layer in sorted(errors)), window, least, most)
    keep = Evict(score, read_budget(budget), window, evict_generated=False, allocate=allocate)
    return Method(keep=keep, calibrations=(calibration,))
