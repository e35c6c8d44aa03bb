"""The command ``kvote``. Nothing heavy is imported before a command needs it, so that help comes at once."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from kvote.cli.arguments import parser
from kvote.cli.output import check_output
from kvote.cli.plain import warn
from kvote.errors import KvoteError

USAGE, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. What the user can mend is said in one line, without a traceback."""
    try:
        args = parser().parse_args(argv)
        check_output()
        import_module(args.module).run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
    except KvoteError as error:
        return _fail(str(error), getattr(error, "exit_code", USAGE))
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe left (``kvote methods | head -1``): nothing is wrong, and nothing more may be written.
        _discard()
    except OSError as error:
        # Files of the user's have been refused where they are named: what is left is the output, or the machine.
        where = f"{error.filename}: " if error.filename else ""
        code = _fail(f"Stopped: {where}{error.strerror or error}", USAGE)
        _discard()
        return code
    except MemoryError:
        return _fail("Memory ran out", USAGE)
    return 0


def _discard() -> None:
    """Standard output is written into nothing from here on, also what Python still holds of it when it ends."""
    with suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    warn(message)
    return code
