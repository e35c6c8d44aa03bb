"""Blocks of bytes in a file that nobody else can open, and that is gone with whoever holds it."""

import os
import tempfile
import threading
import weakref
from collections import deque
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvote.errors import MethodError, StorageError


class Block:
    """A block of a ``Spill``. Never changed once written, so whoever copies what holds it shares it; its place is free
    again when the last of them lets go."""

    __slots__ = ("number", "spill")

    def __init__(self, spill: "Spill", number: int) -> None:
        self.spill, self.number = spill, number

    def __deepcopy__(self, memo: object) -> "Block":
        return self

    def __del__(self) -> None:
        # Any thread may collect garbage, so nothing is locked here.
        self.spill.freed.append(self.number)


class Spill:
    """A file of blocks of ``nbytes`` each in ``folder``. It has no name, so nothing is left of it, whatever ends the
    process; nothing maps it, so whatever happens to the disk is an error and no signal.

    ``read``, ``written``: bytes so far.
    """

    def __init__(self, folder: str, nbytes: int) -> None:
        self.folder, self.block = folder, nbytes
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                self.file = os.dup(file.fileno())
        except OSError as error:
            raise StorageError(f"No file can be made in {folder}: {error.strerror}.") from error
        weakref.finalize(self, os.close, self.file)
        self.read = self.written = 0
        self.freed: deque[int] = deque()
        self._free: list[int] = []
        self._end = 0
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: object) -> "Spill":
        return self

    @property
    def nbytes(self) -> int:
        """Bytes on the disk of blocks that somebody holds."""
        return (self._end - len(self._free) - len(self.freed)) * self.block

    def put(self, content: Tensor) -> list[Block]:
        """Writes uint8 [n, nbytes] into as many blocks, whole or not at all. Raises StorageError."""
        with self._lock:
            numbers = self._take(len(content))
        blocks = [Block(self, number) for number in numbers]
        for number, count, first in _runs(np.array(numbers), 1):
            data = content[first : first + count].numpy().reshape(-1).data
            at = number * self.block
            while data:
                try:
                    done = os.pwrite(self.file, data, at)
                except OSError as error:
                    raise StorageError(
                        f"{len(content) * self.block:,} bytes of a cache could not be written into {self.folder}: "
                        f"{error.strerror}. Free some room or name another folder, and call cache.reset()."
                    ) from error
                data, at = data[done:], at + done
                self.written += done
        return blocks

    def get(self, places: np.ndarray, into: Tensor) -> None:
        """Fills ``into``, uint8 [n, bytes] in one piece, with the rows at ``places`` int64 [n] in the file. Raises
        StorageError unless all of them came back."""
        file, row = self.file, into.shape[1]
        data = into.numpy().reshape(-1).data
        runs = list(_runs(places, row))
        if hasattr(os, "posix_fadvise"):
            # All at once, so that a disk has many to fetch at a time; the last are those that come first below.
            for at, count, _ in runs[1:]:
                os.posix_fadvise(file, at, count * row, os.POSIX_FADV_WILLNEED)
        for at, count, first in runs:
            part, at = data[first * row : (first + count) * row], int(at)
            while part:
                try:
                    done = os.preadv(file, [part], at)
                except OSError as error:
                    raise StorageError(f"What a cache holds in {self.folder} cannot be read: {error}.") from error
                if not done:
                    raise StorageError(f"What a cache holds in {self.folder} came back in part only.")
                part, at = part[done:], at + done
                self.read += done

    def _take(self, count: int) -> list[int]:
        """Free blocks, side by side where that can be."""
        self._gather()
        taken = self._free[:count]
        self._free = self._free[count:]
        taken += range(self._end, self._end + count - len(taken))
        self._end = max(self._end, taken[-1] + 1)
        return taken

    def trim(self) -> None:
        """Gives free blocks at the end of the file back."""
        with self._lock:
            self._gather()
            before = self._end
            while self._free and self._free[-1] == self._end - 1:
                self._free.pop()
                self._end -= 1
            if self._end < before:
                os.ftruncate(self.file, self._end * self.block)

    def _gather(self) -> None:
        while self.freed:
            self._free.append(self.freed.popleft())
        self._free.sort()


def _runs(places: np.ndarray, step: int) -> list[tuple[int, int, int]]:
    """Where places go on by ``step``: [(first place, places, index of the first), ...]."""
    if not len(places):
        return []
    edges = np.concatenate([[0], np.flatnonzero(np.diff(places) != step) + 1, [len(places)]])
    return [(int(places[a]), int(b - a), int(a)) for a, b in pairwise(edges)]


def check_folder(method: str, folder: str | None) -> str:
    """A folder to write into; without one, /var/tmp, which is meant for what is large, where there is such a folder.
    Raises MethodError."""
    if not hasattr(os, "preadv"):
        raise MethodError(f"{method}: this system has no preadv, by which files are read.")
    if folder is None:
        return "/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir()
    if not isinstance(folder, str) or not Path(folder).is_dir() or not os.access(folder, os.W_OK):
        raise MethodError(f"{method}: {folder!r} is no folder that can be written into.")
    return folder


def as_bytes(tokens: Tensor) -> Tensor:
    """Tokens [n, ...] as uint8 [n, bytes], in main memory."""
    return tokens.to("cpu").contiguous().view(torch.uint8).reshape(len(tokens), -1)
