"""Standard output: whether results can be written there is found out before they are measured."""

import os
import stat
import sys

from kvote.errors import InputError


def check_output() -> None:
    """Raises InputError where nothing can be written to standard output; what its encoding lacks is written out."""
    if sys.stdout is None:
        raise InputError("Standard output is closed, so that the result could not be printed.")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        descriptor = sys.stdout.fileno()
        found = os.fstat(descriptor)
        full = stat.S_ISREG(found.st_mode) and os.fstatvfs(descriptor).f_bavail == 0
        full |= stat.S_ISCHR(found.st_mode) and found.st_rdev == os.stat("/dev/full").st_rdev
    except (AttributeError, OSError, ValueError):
        # No descriptor, or a system that does not say: writing will show.
        return
    if full:
        raise InputError("Standard output leads to a full device, so that the result could not be written.")
