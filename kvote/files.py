"""Files that users name: only regular ones are read or replaced; a reader sees the old one or the new one, whole."""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

from kvote.errors import InputError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def read_regular(path: str | Path, largest: int) -> bytes:
    """All bytes of a regular file. Raises InputError for what is none, is not there or holds more than ``largest``."""
    try:
        # Without O_NONBLOCK, opening a pipe waits for somebody who writes.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
        try:
            held = os.fstat(descriptor)
            if not stat.S_ISREG(held.st_mode):
                raise InputError(f"Cannot read {_shown(path)}: it is {_kind(held)}, not a file.")
            # A file may grow meanwhile, and those of some file systems say that they are empty.
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                data = file.read(largest + 1) if held.st_size <= largest else None
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"Cannot read {_shown(path)}: {_reason(error)}.") from error
    if data is None or len(data) > largest:
        raise InputError(f"{_shown(path)} is larger than the {largest // 2**20} MiB that are read.")
    return data


def check_writable(path: str | Path) -> None:
    """Raises InputError unless ``write_whole`` can write ``path`` now; leaves nothing behind."""
    try:
        target = _target(path)
        temporary, descriptor = _create(target)
        os.close(descriptor)
        temporary.unlink()
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error


def write_whole(path: str | Path, text: str) -> None:
    """Writes UTF-8 text at once; a symbolic link goes on pointing where it does. Raises InputError where it cannot."""
    try:
        target = _target(path)
        temporary, descriptor = _create(target)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            os.replace(temporary, target)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
    except (OSError, ValueError) as error:
        raise _cannot_write(path, error) from error


def _target(path: str | Path) -> Path:
    """Where links lead. Raises InputError where something lies that is no regular file, or no folder holds it."""
    try:
        held: os.stat_result | None = os.stat(path)
    except FileNotFoundError:
        held = None
    target = Path(os.path.realpath(path))
    if held is not None and not stat.S_ISREG(held.st_mode):
        raise InputError(f"Cannot write {_shown(path)}: it is {_kind(held)}{_instead(held)}.")
    if not target.parent.is_dir():
        # The folder as it was named, unless a link leads elsewhere.
        folder = target.parent if Path(path).is_symlink() else Path(path).parent
        raise InputError(f"Cannot write {_shown(path)}: there is no folder {folder}.")
    return target


def _create(target: Path) -> tuple[Path, int]:
    """A new file beside ``target``, with the rights that the user's new files have."""
    name = f".{target.name[:100]}.{secrets.token_hex(8)}"
    temporary = target.with_name(name)
    return temporary, os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _kind(held: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(held.st_mode), "something else")


def _instead(held: os.stat_result) -> str:
    return "" if stat.S_ISDIR(held.st_mode) else ", not a file"


def _cannot_write(path: str | Path, error: OSError | ValueError) -> InputError:
    return error if isinstance(error, InputError) else InputError(f"Cannot write {_shown(path)}: {_reason(error)}.")


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _shown(path: str | Path) -> str:
    """The name without what a terminal cannot show."""
    text = str(path)
    return text if text.isprintable() and text.strip() else ascii(text)
