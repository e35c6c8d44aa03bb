"""The command ``kvote``. Nothing heavy is imported before a command needs it, so that help comes at once."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from kvote.cli.arguments import parser
from kvote.errors import KvoteError

USAGE, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. What the user can mend is said in one line, without a traceback."""
    try:
        args = parser().parse_args(argv)
        import_module(args.module).run(args)
        sys.stdout.flush()
    except KvoteError as error:
        return _fail(str(error), getattr(error, "exit_code", USAGE))
    except KeyboardInterrupt:
        return _fail("interrupted.", INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe left (``kvote methods | head -1``): nothing is wrong, and nothing more may be written.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    print(f"kvote: {line if line.endswith(('.', '?', '!')) else line + '.'}", file=sys.stderr)
    return code
