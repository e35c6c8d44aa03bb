"""Budget: how much of a text may stay, as one dial. Whole numbers are tokens, fractions are of the tokens seen, and a
text such as "512MiB" is bytes."""

import re
from dataclasses import dataclass
from typing import Literal

from kvote.errors import MethodError
from kvote.numbers import is_number
from kvote.store.pages import PAGE

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# A burst is this part of what may be held.
_PART = 64
_BYTES = re.compile(rf"\s*(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})\s*")


@dataclass(frozen=True)
class Budget:
    """``amount`` tokens per sequence and key head, or that share of the tokens seen, or bytes over all layers that
    kvote manages and all sequences. ``least``: tokens that a share is at least; ``besides``: tokens on top of it."""

    amount: float
    unit: Literal["tokens", "fraction", "bytes"] = "tokens"
    least: int = 1
    besides: int = 0

    def tokens(self, seen: int) -> int:
        """Tokens that a sequence of ``seen`` tokens may hold, at least one; bytes are for the store to translate."""
        share = whole(self.amount * seen if self.unit == "fraction" else self.amount)
        return max(self.least, share) + self.besides


def whole(tokens: float) -> int:
    """Whole tokens of a share. 0.29 * 100 is 28.999999999999996, and 29 were meant."""
    return int(tokens + 1e-9)


def check_burst(burst: object) -> None:
    """Raises MethodError unless it is None or a whole number of tokens up to a page."""
    if burst is not None and (not isinstance(burst, int) or isinstance(burst, bool) or not 1 <= burst <= PAGE):
        raise MethodError(f"burst must be a whole number of tokens from 1 to {PAGE}, or None; got {burst!r}.")


def after_burst(most: int, burst: int | None = None) -> int:
    """Tokens that stay once generated ones have made them more than ``most``, so that this happens once in ``burst``
    steps: to let go of a single token, all behind it are moved. None: a 64th of ``most``, a page at most. One stays, if
    any may."""
    burst = min(max(most // _PART, 1), PAGE) if burst is None else burst
    return min(most, max(1, most - burst + 1))


def budget(value: object) -> Budget:
    """Reads a budget: 1024, 0.25 or "512MiB". Raises MethodError for anything else."""
    if isinstance(value, str) and (match := _BYTES.fullmatch(value)):
        amount = float(match[1]) * _UNITS[match[2]]
        if is_number(amount):
            return Budget(amount, "bytes")
    if isinstance(value, int) and is_number(value) and value >= 1:
        return Budget(value)
    if isinstance(value, float) and 0 < value <= 1:
        return Budget(value, "fraction")
    raise MethodError(
        f"budget must be tokens such as 1024, a fraction of the tokens seen such as 0.25 (at most 1.0), or bytes such "
        f'as "512MiB"; got {value!r}.'
    )
