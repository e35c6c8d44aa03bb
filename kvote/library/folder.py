"""Folder: prefixes as files, which several processes share.

A file's name says what it was read with and which tokens, so two processes that write the same one write the same
thing. Files appear whole (a draft, then a rename) and are read without a lock; who writes or removes some holds the
lock of the folder. One that is gone or damaged is no hit.
"""

import importlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvote.cache import Cache
from kvote.errors import InputError, KvoteError
from kvote.files import check_folder
from kvote.library.prefix import Prefix, name_of, worth
from kvote.method import Method
from kvote.saving import caches
from kvote.saving.block_file import BlockFile, DamagedFileError
from kvote.saving.classes import forms
from kvote.state import Describer

KIND = "prefix"
_ENDING = ".kv"
# Files of other names are left alone.
_OURS = re.compile(r"[0-9a-f]{32}-[0-9a-f]{64}\.kv")
# Seconds without a write after which a draft counts as left behind by a process that died.
_ABANDONED = 3600


@dataclass(frozen=True)
class Filed:
    """The contents of a file: the ids [n] of a prefix, and the seconds that reading it takes."""

    name: str
    ids: Tensor
    seconds: float


class Folder:
    """At most ``most`` bytes of files. Raises InputError for a folder that cannot be written."""

    def __init__(self, path: str | Path, most: int) -> None:
        self.path, self._most = Path(path), most
        if not self.path.exists():
            with suppress(OSError):
                self.path.mkdir(mode=0o700, parents=True)
        check_folder(self.path)
        self._known: dict[str, Filed] = {}

    def prefixes(self, scope: str) -> list[Filed]:
        """The prefixes that were read with ``scope``."""
        names = [entry.name for entry in self._entries() if entry.name.startswith(f"{scope[:32]}-")]
        return [filed for name in names if (filed := self._told(name)) is not None]

    def fetch(self, filed: Filed, model: Any, method: Method) -> Cache | None:
        """The cache of a prefix, checked whole; None where it cannot be used, and a damaged file is removed."""
        try:
            cache, facts, maker = caches.load(self.path / filed.name, model, method, KIND)
            with caches.sensible(filed.name):
                same = torch.equal(maker.value(facts["prefix"]["ids"]).cpu(), filed.ids)
            if not same or cache.get_seq_length() != len(filed.ids):
                raise DamagedFileError(filed.name)
        except DamagedFileError:
            self._remove(filed.name)
            return None
        except KvoteError:
            return None
        with suppress(OSError):
            os.utime(self.path / filed.name)
        return cache

    def keep(self, prefix: Prefix) -> bool:
        """Writes a prefix, and removes what is worth least to make room; whether it is there now.

        Raises InputError where nothing can be written.
        """
        name = prefix.name + _ENDING

        def more(describer: Describer) -> dict[str, Any]:
            ids = describer.value(prefix.ids, "prefix.ids")
            return {"prefix": {"scope": prefix.scope, "seconds": prefix.seconds, "ids": ids}}

        expected = _size(prefix)
        if expected > self._most:
            return False
        with self._locked():
            if (self.path / name).exists():
                return True
            self._make_room(self._most - expected)
            caches.save(prefix.cache, self.path / name, KIND, more)
            self._make_room(self._most)
            return (self.path / name).exists()

    def size(self) -> tuple[int, int]:
        """Files, and bytes in them."""
        sizes = [found.st_size for entry in self._entries() if (found := _stat(entry)) is not None]
        return len(sizes), sum(sizes)

    def _told(self, name: str) -> Filed | None:
        """The facts in a file; None for a damaged one, which is removed."""
        if name in self._known:
            return self._known[name]
        try:
            with BlockFile(self.path / name) as file, caches.sensible(name):
                held = file.facts["prefix"]
                ids, seconds = file.tensor(held["ids"]["tensor"]), float(held["seconds"])
                if ids.dtype != torch.int64 or ids.dim() != 1 or name_of(held["scope"], ids) + _ENDING != name:
                    raise ValueError("it has another name")
                if not 0 <= seconds < float("inf"):
                    raise ValueError("it took no time that there is")
        except DamagedFileError:
            self._remove(name)
            return None
        except InputError:
            return None
        return self._known.setdefault(name, Filed(name, ids, seconds))

    def _make_room(self, most: int) -> None:
        """Removes files, those that are worth least first, until no more than ``most`` bytes are left."""
        now, found = time.time(), []
        for entry in self._entries():
            filed, status = self._told(entry.name), _stat(entry)
            if status is not None:
                seconds = 0.0 if filed is None else filed.seconds
                value = worth(seconds, status.st_size, now - status.st_mtime)
                found.append((value, entry.name, status.st_size))
        total = sum(size for _, _, size in found)
        for _, name, size in sorted(found):
            if total <= most:
                break
            self._remove(name)
            total -= size

    def _remove(self, name: str) -> None:
        self._known.pop(name, None)
        with suppress(OSError):
            (self.path / name).unlink()

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        with suppress(FileNotFoundError), os.scandir(self.path) as entries:
            for entry in entries:
                if _OURS.fullmatch(entry.name) and entry.is_file():
                    yield entry

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InputError(f"Cannot write into {self.path}: {error.strerror}.") from error
        try:
            fcntl = importlib.import_module("fcntl")
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._sweep()
            yield
        finally:
            os.close(lock)

    def _sweep(self) -> None:
        """Removes drafts of processes that died."""
        for draft in self.path.glob(".kvote-*"):
            with suppress(OSError):
                if time.time() - draft.stat().st_mtime > _ABANDONED:
                    draft.unlink()


def _size(prefix: Prefix) -> int:
    """Bytes of its file, without the header."""
    describer = Describer(forms())
    with prefix.cache._exclusive:
        caches.describe(prefix.cache, describer)
    blocks = describer.tensors.values()
    return prefix.ids.nbytes + sum(prod(block.shape) * block.dtype.itemsize for block in blocks)


def _stat(entry: "os.DirEntry[str]") -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:
        return None
