"""Double Sparsity: few tokens, found by few channels (Yang et al. 2024, arXiv 2408.07092)."""

from kvote.calibration.channels import KIND, order_of
from kvote.calibration.file import Calibration, command, load
from kvote.errors import MethodError
from kvote.method import Method, published
from kvote.read.labels import LabelWinners


@published(rooms="read", source="Yang et al. 2024, arXiv 2408.07092", needs="calibrated channels (`kvote calibrate`)")
def doublesparsity(
    channels: str | Calibration | None = None, top_k: int = 256, share: float = 0.25, dense_layers: int = 2
) -> Method:
    """Generated tokens score the text by a few channels of its keys and read what scores best; keeps everything.

    ``channels``: file that `kvote calibrate --what channels` wrote for this model, or what it holds. The first
    ``share`` of them, as the model rotated the key, also lie apart as a label of each token, in the model's dtype (a
    quarter of 128 channels in bfloat16: 64 bytes, where key and value take 512). Every query head reads the ``top_k``
    tokens whose labels have the largest product with its own, all channels of their keys, at their own positions.
    Nothing else is read: no sinks, no recent tokens. The first ``dense_layers`` layers attend to everything and have no
    labels.

    Prompts, further turns and drafts of assisted decoding (any pass of several tokens, and any that ``Cache.expect``
    announced) are read whole.

    Differs from the published code: channels are chosen per key head, by the mean of |q * k| over all query heads that
    share it, where the published code repeats keys for every query head and chooses for each; there a group of four
    heads would need labels as large as the keys. The statistic counts all calibration tokens, where in the published
    code only the last sample survives.

    Missing: labels in 2 or 4 bits (with which the paper's half of the channels cost a sixteenth; here a label costs
    what its channels cost); keys and values kept in host memory and fetched a layer ahead (the offloading variant); the
    statistics of queries or keys alone, which the published code also offers; selection inside prompts, which the
    published code has for measuring perplexity.
    """
    if channels is None:
        raise MethodError(
            f"doublesparsity needs to know this model's channels: run {command(KIND)} once, and write "
            "doublesparsity(channels='FILE')."
        )
    if not isinstance(channels, str | Calibration):
        raise MethodError(f"channels must be the name of a file; got {channels!r}.")
    calibration = load(channels, KIND) if isinstance(channels, str) else channels
    reader = LabelWinners(order_of(calibration), top_k, share, dense_layers)
    return Method(read=reader, calibrations=(calibration,))
