"""Text that a terminal shows and does not obey."""

import json
import re
import sys
from typing import Any

# Control characters but newline and tab; what turns the direction of writing; separators of lines; lone surrogates.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# Arguments that are quoted can be of any length.
_LONGEST = 1_000


def plain(text: str) -> str:
    r"""``text`` with every character that a terminal would obey written out, such as ``\x1b``."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """The same on a single line."""
    return plain(" ".join(text.split()))


def as_json(value: Any) -> str:
    """One JSON object in ASCII, so that nothing in it is obeyed either."""
    return json.dumps(value, indent=1)


def warn(message: str) -> None:
    """One sentence for people, on standard error."""
    line = one_line(message)
    line = line if len(line) <= _LONGEST else line[:_LONGEST].rstrip() + " …"
    if sys.stderr is not None:
        print(f"kvote: {line if line.endswith(('.', '?', '!', '…')) else line + '.'}", file=sys.stderr, flush=True)
