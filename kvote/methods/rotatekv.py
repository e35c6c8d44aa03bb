"""RotateKV: 2 bits by outlier-aware rotations (Su et al., IJCAI 2025, arXiv 2501.16383)."""

from kvote.calibration.file import Calibration, load
from kvote.calibration.rotated import HEADS, KIND, orders_of
from kvote.errors import MethodError
from kvote.kernels.packing import BITS, GROUP_SIZES
from kvote.method import Method, published
from kvote.numbers import is_number, is_whole
from kvote.store.apart import SinksApart
from kvote.store.codec import Codec
from kvote.store.transform import Rotation


@published(rooms="store", source="Su et al. 2025, arXiv 2501.16383")
def rotatekv(
    order: str | Calibration | None = None,
    bits: int = 2,
    group: int = 128,
    heads: int = HEADS,
    sinks: int = 20,
    clip: float | None = None,
) -> Method:
    """Holds keys and values in 2 bits, rotated so that outliers spread, and attention sinks as they are; reads all.

    Keys lose their position, ``heads`` neighbouring key heads are rotated together by a Hadamard matrix, and the
    channels of a layer are put in ``order``, so that neighbours have alike offsets; values are rotated head by head.
    Each token is then rounded by itself, in groups of ``group`` channels of a head at most, to 2^``bits`` steps between
    ``clip`` times the extremes of the group, of which one step is at 0. What is read is decoded, put back in order,
    rotated back, and keys are given their positions. Nothing recent is left out: a generated token is rounded as soon
    as it was read.

    ``order``: file that `kvote calibrate --what rotated` wrote for this model, or what it holds; without, channels stay
    where the rotation has put them. ``heads``: as many as divide the key heads that there are. ``sinks``: tokens of
    prompts with the so many largest entries of all that enter a layer are sinks and stay exact there, in each layer its
    own. ``clip``: None is 0.8 with 2 bits and 1 with more, as published.

    Differs from the published code: a prompt is rounded when it has ended, so it reads itself exactly (there, rounded);
    rotations are not put into the weights, so models need not be changed, and biases and key norms need no care; sizes
    that are no power of two are rotated in blocks; groups do not span heads (with heads of 128 channels they do not
    there either); the span is divided by 2^bits - 1 for all bits; a later turn's tokens are sinks if their entries
    are among the largest of all prompts so far; sinks differ by sequence. Codes of sinks are held too, and up to 63
    uncompressed tokens per sequence, until their page is full. The order sorts channels by their sums, as the published
    code does (its text speaks of outliers), of the texts that one calibrates with.

    Missing: kernels that read rotated codes (all is decoded for every query, so a step is slow); 3 bits.
    """
    if bits not in BITS or not is_whole(bits):
        raise MethodError(f"rotatekv: bits must be 2, 4 or 8; got {bits!r}.")
    if group not in GROUP_SIZES:
        raise MethodError(
            f"rotatekv: group must be {', '.join(map(str, GROUP_SIZES[:-1]))} or {GROUP_SIZES[-1]}; got {group!r}."
        )
    for name, number, least in (("heads", heads, 1), ("sinks", sinks, 0)):
        if not is_whole(number) or number < least:
            raise MethodError(f"rotatekv: {name} must be a whole number of at least {least}; got {number!r}.")
    if clip is not None and (not is_number(clip) or not 0 < clip <= 1):
        raise MethodError(f"rotatekv: clip must be a number above 0 and at most 1; got {clip!r}.")
    if order is not None and not isinstance(order, str | Calibration):
        raise MethodError(f"rotatekv: order must be the name of a file; got {order!r}.")
    held = load(order, KIND) if isinstance(order, str) else order
    orders = () if held is None else orders_of(held, heads)
    span = clip if clip is not None else 0.8 if bits == 2 else 1.0
    codec = Codec(bits, group, True, span, Rotation(heads), Rotation())
    return Method(store=SinksApart(codec, sinks, orders), calibrations=() if held is None else (held,))
