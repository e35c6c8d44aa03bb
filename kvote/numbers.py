"""Numbers and switches that users give: what makes sense as one."""

import operator

from kvote.errors import MethodError

# The largest number in float32, in which all that methods compute with a parameter is computed.
_LARGEST = 3.4028234663852886e38


def is_number(value: object) -> bool:
    """Whether it is a whole or fractional number that float32 can hold; True, infinity and NaN are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def is_whole(value: object) -> bool:
    """Whether it is a whole number, of Python, numpy or torch; True is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return False
    try:
        operator.index(value)
    except (TypeError, RuntimeError):
        # A tensor of several numbers, or of fractions.
        return False
    return True


def check_whole(owner: object, **least: int) -> None:
    """Raises MethodError unless each named attribute of ``owner`` is a whole number of at least so much."""
    for name, smallest in least.items():
        value = getattr(owner, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
            raise MethodError(f"{name} must be a whole number of at least {smallest}; got {value!r}.")


def check_flags(owner: object, *names: str) -> None:
    """Raises MethodError unless each named attribute of ``owner`` is True or False."""
    for name in names:
        if not isinstance(getattr(owner, name), bool):
            raise MethodError(f"{name} must be True or False; got {getattr(owner, name)!r}.")
