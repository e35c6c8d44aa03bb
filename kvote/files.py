"""Files that users name: only regular ones are read or replaced, and always whole."""

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from kvote.errors import InputError

# Opening a FIFO must not wait for somebody who writes.
_READING = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_PIECE = 2**20
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_regular(path: str | Path, largest: int) -> bytes:
    """All bytes of a regular file of at most ``largest`` bytes. Raises InputError for anything else."""
    try:
        with open_regular(path) as file:
            data = at_most(file, largest)
    except OSError as error:
        raise InputError(f"Cannot read {named(path)}: {reason(error)}.") from error
    if data is None:
        raise InputError(f"{named(path)} is larger than the {largest // 2**20} MiB that are read.")
    return data


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, open for reading. Raises InputError for anything else."""
    try:
        file = os.fdopen(os.open(path, _READING), "rb")
        if kind := irregular(os.fstat(file.fileno())):
            file.close()
            raise InputError(f"Cannot read {named(path)}: it is {kind}, not a file.")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"Cannot read {named(path)}: {reason(error)}.") from error
    return file


def at_most(file: BinaryIO, most: int) -> bytes | None:
    """All bytes that are left in ``file``; None if there are more than ``most``. Memory follows what has come."""
    data = bytearray()
    while piece := file.read(_PIECE):
        data += piece
        if len(data) > most:
            return None
    return bytes(data)


def write_whole(path: str | Path, text: str) -> None:
    """Replaces the file by UTF-8 text at once, as ``replacing`` does."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def replacing(path: str | Path, mode: int | None = None) -> Iterator[BinaryIO]:
    """A draft to write, which replaces the file at once when it is whole and on disk: a reader sees the old one or the
    new one, a failure leaves the old one.

    A symbolic link stays, and the file that it leads to is replaced. ``mode``: who may read the new one; None: who
    could read the old one. Raises InputError where nothing can be written.
    """
    draft = None
    try:
        target, own = _target(path)
        descriptor, draft = tempfile.mkstemp(dir=target.parent, prefix=".kvote-")
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        os.chmod(draft, own if mode is None else mode)
        os.replace(draft, target)
        _sync(target.parent)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error
    finally:
        if draft is not None:
            Path(draft).unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raises InputError unless ``write_whole`` could write there now; changes nothing."""
    try:
        _probe(_target(path)[0].parent)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


def check_folder(path: str | Path) -> None:
    """Raises InputError unless files can be written into that folder, which is made if there is none, or into what
    is there already under their names."""
    try:
        if os.path.lexists(path) and not os.path.isdir(path):
            raise InputError(f"Cannot write {named(path)}: it is not a folder.")
        Path(path).mkdir(parents=True, exist_ok=True)
        _probe(Path(path))
        with os.scandir(path) as entries:
            for entry in entries:
                if not entry.is_dir():
                    _target(entry.path)
    except (OSError, ValueError) as error:
        raise _unwritable(path, error) from error


def irregular(found: os.stat_result) -> str | None:
    """The kind of a file that is no regular one, with its article; None for a regular one."""
    if stat.S_ISREG(found.st_mode):
        return None
    return next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "something else")


def named(path: str | Path) -> str:
    """A path as messages show it: without characters that a terminal cannot show."""
    text = str(path)
    return text if text.isprintable() and text.strip() else ascii(text)


def reason(error: OSError | ValueError) -> str:
    """Why a file could not be used, as a clause without a full stop."""
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")


def _target(path: str | Path) -> tuple[Path, int]:
    """The file behind all links, which need not exist, and the mode that it has or gets."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        folder = target.parent if os.path.islink(path) else Path(path).parent
        raise InputError(f"Cannot write {named(path)}: there is no folder {folder}.")
    try:
        found = os.stat(target)
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return target, 0o666 & ~mask
    if kind := irregular(found):
        instead = "" if stat.S_ISDIR(found.st_mode) else ", not a file"
        raise InputError(f"Cannot write {named(path)}: it is {kind}{instead}.")
    if not os.access(target, os.W_OK):
        raise PermissionError(13, "Permission denied")
    return target, stat.S_IMODE(found.st_mode)


def _sync(folder: Path) -> None:
    """Has a folder remember its files' names over a crash, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _probe(folder: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".kvote-") as file:
        file.write(b"x")


def _unwritable(path: str | Path, error: OSError | ValueError) -> InputError:
    return error if isinstance(error, InputError) else InputError(f"Cannot write {named(path)}: {reason(error)}.")


def strict_json(text: str) -> Any:
    """Parses JSON from others. Raises ValueError for invalid JSON, for NaN and infinities, and for duplicate keys."""
    return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) < len(pairs):
        raise ValueError("a key stands there twice")
    return held


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
