"""Numbers as they stand on the command line."""

import argparse

# More tokens, steps or seconds than anything here can mean.
_MOST = 10**15
# Characters of a value that an error quotes.
_SHOWN = 40


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return whole(text, 1)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return whole(text, 0)


def whole(text: str, least: int) -> int:
    """A whole number of at least ``least``."""
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= _MOST:
        shown = repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r} …"
        bounds = f"of at least {least}" if value < least else f"from {least} to {_MOST:,}"
        raise argparse.ArgumentTypeError(f"must be a whole number {bounds}, got {shown}")
    return value


def number(text: str) -> float:
    """A number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 <= value <= _MOST:
        shown = repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r} …"
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {shown}")
    return value


def budget(text: str) -> float:
    """A share up to 1, or a whole number of tokens."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= _MOST or (value > 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"must be a share up to 1 or a number of tokens, got {text[:_SHOWN]!r}")
    return value


def port(text: str) -> int:
    """A port, 0 for any."""
    value = whole(text, 0)
    if value > 65_535:
        raise argparse.ArgumentTypeError(f"must be a port from 0 to 65535, got {value}")
    return value
