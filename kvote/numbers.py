"""Numbers that users give: what makes sense as one."""

# The largest number in float32, in which all that methods compute with a parameter is computed.
_LARGEST = 3.4028234663852886e38


def is_number(value: object) -> bool:
    """Whether it is a whole or fractional number that float32 can hold; True, infinity and NaN are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST
