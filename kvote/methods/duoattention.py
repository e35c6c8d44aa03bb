"""DuoAttention: retrieval and streaming heads (Xiao et al., ICLR 2025, arXiv 2410.10819)."""

from random import Random

import torch

from kvote.calibration.file import Calibration, command
from kvote.calibration.file import load as load_calibration
from kvote.calibration.heads import DUO, scores_of
from kvote.errors import MethodError
from kvote.keep.allocate.heads import KeepByHead, Scores, best
from kvote.keep.evict import sinks_and_recent
from kvote.method import Method, published

_NOISE = 1e-6


@published(rooms="keep", source="Xiao et al. 2024, arXiv 2410.10819", needs="trained head gates (`kvote calibrate`)")
def duoattention(
    heads: str | Calibration | None = None,
    sparsity: float = 0.5,
    sinks: int = 64,
    window: int = 256,
    burst: int | None = None,
) -> Method:
    """Heads whose trained gate stayed open keep everything; the others stream: first tokens and a sliding window.

    ``heads``: file that `kvote calibrate --what duo` wrote for this model, or what it holds. ``sparsity``: share of all
    key heads that stream, those with the smallest gates (the paper: 0.5 where query heads share keys, 0.75 where they
    do not). Streaming heads keep ``sinks`` first tokens and the last ``window`` ones, at the text's own positions. They
    are cut down after every pass: a prompt in one pass is read in full by all heads, and in a prompt that comes in
    several, a pass sees itself, the sinks and the window before it. ``burst``: once a generated token exceeds the
    window, so many leave it at once (64 at most), and it is up to ``burst`` - 1 tokens shorter in between; None is a
    64th of the window, 1 a token per step, as in ``streamingllm``.

    Streaming heads hold their tokens as the model made them, and read all of them, whatever the method is joined with:
    in ``duoattention | tokenselect``, the other heads vote and select.

    Heads are told apart by their place, not reordered in the weights as in the published code. The default of 64 + 256
    tokens is that of its LongBench runs (its measurements of speed: 128 + 256).
    """
    if heads is None:
        raise MethodError(
            f"duoattention needs to know this model's heads: run {command(DUO)} once, and write "
            "duoattention(heads='FILE')."
        )
    if not isinstance(heads, str | Calibration):
        raise MethodError(f"heads must be the name of a file; got {heads!r}.")
    if not isinstance(sparsity, int | float) or isinstance(sparsity, bool) or not 0 <= sparsity <= 1:
        raise MethodError(f"sparsity must be a share from 0 to 1; got {sparsity!r}.")
    whole_numbers = all(isinstance(value, int) and not isinstance(value, bool) for value in (sinks, window))
    if not whole_numbers or sinks < 0 or window < 1:
        raise MethodError(
            f"duoattention needs whole numbers sinks >= 0 and window >= 1; got sinks={sinks!r}, window={window!r}."
        )
    calibration = load_calibration(heads, DUO) if isinstance(heads, str) else heads
    gates = scores_of(calibration, DUO)["gate"]
    each = tuple((layer, len(found)) for layer, found in gates.items())
    few = sinks_and_recent(sinks, window, burst)
    keep = KeepByHead(_above_quantile(gates, sparsity), each, few, calibration.name)
    return Method(keep=keep, calibrations=(calibration,))


def _above_quantile(gates: Scores, sparsity: float) -> frozenset[tuple[int, int]]:
    """The heads whose gate reaches the quantile of all; noise too small to matter breaks ties, the same every time."""
    draw = Random(0)
    noisy = {layer: [gate + draw.uniform(0, _NOISE) for gate in found] for layer, found in gates.items()}
    values = torch.tensor([gate for found in noisy.values() for gate in found], dtype=torch.float64)
    count = int((values >= values.quantile(sparsity)).sum()) if sparsity < 1 else 0
    return frozenset(best(noisy, count))
