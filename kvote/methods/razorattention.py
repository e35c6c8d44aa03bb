"""RazorAttention: KV cache compression through retrieval heads (Tang et al., ICLR 2025, arXiv 2407.15891)."""

from kvote.calibration.file import Calibration, command
from kvote.calibration.file import load as load_calibration
from kvote.calibration.heads import RAZOR, scores_of
from kvote.errors import MethodError
from kvote.keep.allocate.heads import KeepByHead, best
from kvote.keep.budget import Budget
from kvote.keep.budget import budget as read_budget
from kvote.keep.merge.means import recent_and_mean
from kvote.method import Method, published


@published(rooms="keep", source="Tang et al. 2024, arXiv 2407.15891", needs="calibrated heads (`kvote calibrate`)")
def razorattention(
    heads: str | Calibration | None = None,
    sinks: int = 4,
    least: int = 4000,
    share: float = 0.2,
    budget: int | float | str | None = None,
    compensation: bool = True,
    induction: float = 0.14,
    echo: float = 0.01,
    burst: int | None = None,
) -> Method:
    """Heads that find what was said before keep everything; the others a recent part, and a mean of the rest.

    ``heads``: file that `kvote calibrate --what razor` wrote for this model, or what it holds. Of the key heads of all
    layers together, the share ``induction`` with the most attention to what followed the same token before keep
    everything, and the share ``echo`` with the most attention to that token itself. A prompt is read in full by all
    heads, so its own logits are exact; at its end the others are cut down to ``sinks`` first tokens and the last
    ``share`` of the tokens seen, or ``least`` if that is more. What they drop, then and while generating, becomes one
    token: the mean of the keys, as the model rotated them, and of the values, with the log of their number added to its
    logit (``compensation``).

    ``budget``: instead of ``least`` and ``share``, the tokens that each of the other heads holds, sinks among them, as
    a number (1024), a fraction of the tokens seen (0.25) or bytes ("512MiB", for these heads of all layers and
    sequences together). The mean comes on top, in float32. ``burst``: once a generated token exceeds that number, so
    many go at once (64 at most): what stays is moved once in so many steps, and up to ``burst`` - 1 tokens fewer are
    held in between. None is a 64th of the number, sinks apart; 1 is one token per step, as in the paper.

    Other heads hold their tokens as the model made them, and read all of them, whatever the method is joined with: in
    ``razorattention | tokenselect``, the heads that keep everything vote and select.

    With the paper's defaults, nothing is dropped up to ``least`` tokens, 4,000, and ``cache.report()`` says so; shorter
    texts need a smaller ``least`` or a ``budget``.

    The end of every pass counts as a prompt's end, unless ``Cache.expect`` announced a prompt in several passes. The
    share follows the text as it grows; the paper fixes it at the prompt. Missing: the search for models with ALiBi, by
    their weights.
    """
    if heads is None:
        raise MethodError(
            f"razorattention needs to know this model's heads: run {command(RAZOR)} once, and write "
            "razorattention(heads='FILE')."
        )
    if not isinstance(heads, str | Calibration):
        raise MethodError(f"heads must be the name of a file; got {heads!r}.")
    for name, value in (("share", share), ("induction", induction), ("echo", echo)):
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
            raise MethodError(f"{name} must be a share from 0 to 1; got {value!r}.")
    if not isinstance(least, int) or isinstance(least, bool) or least < 1:
        raise MethodError(f"least must be a whole number of at least 1; got {least!r}.")
    calibration = load_calibration(heads, RAZOR) if isinstance(heads, str) else heads
    scores = scores_of(calibration, RAZOR)
    each = tuple((layer, len(found)) for layer, found in scores["echo"].items())
    count = sum(found for _, found in each)
    whole = best(scores["induction"], round(induction * count)) | best(scores["echo"], round(echo * count))
    limit = Budget(share, "fraction", least, sinks) if budget is None else read_budget(budget)
    few = recent_and_mean(limit, sinks, compensation, burst)
    return Method(keep=KeepByHead(frozenset(whole), each, few, calibration.name), calibrations=(calibration,))
