"""The places at which a prefix may be cut so that what follows goes on as if it had been read at once."""

from typing import Any

from kvote.calibration.fingerprint import Fingerprint
from kvote.method import Method

# Rotations whose angles follow from the length of the text.
_BY_LENGTH = ("longrope", "dynamic")


def grain(method: Method, model: Any) -> int | None:
    """A prefix may be cut at multiples of so many tokens, in front of a prompt's tail; None: only whole.

    It takes what all parts of the method offer (``kvote.needs.Cuts``), and a model that rotates a token alike in texts
    of every length.
    """
    if any(kind in value for _, value in Fingerprint.of(model).rope for kind in _BY_LENGTH):
        return None
    return method.cuts.every


def reusable(shared: int, ends: tuple[int, int], tail: int, grain: int) -> int:
    """How many of the first ``shared`` tokens can be reused of two prompts that end at ``ends``, whose last ``tail``
    tokens are treated one by one."""
    most = min(shared, *(end - tail for end in ends))
    return max(0, most) // grain * grain
