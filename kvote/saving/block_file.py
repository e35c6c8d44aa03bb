"""The file that caches and documents are saved in: safetensors, with a header that says what it is and a digest of
every block. ``docs/format.md`` describes it.

    8 bytes: size of the header | header, JSON | blocks, one after the other | SHA-256 of all before the blocks

Files are not trusted. Nothing in them is executed and no path in them followed; every size is bounded by that of the
file before memory is asked for; a block is read by ``pread`` from the one file that was opened, never mapped, and
hashed as it is read: what does not match is refused.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kvote.env import memory
from kvote.errors import InputError
from kvote.files import named, open_regular, reason, replacing, strict_json
from kvote.state import Block

FORMAT, VERSION = "kvote", 1
# Bytes of a header, at most.
_LARGEST = 64 * 2**20
_SIZE, _DIGEST = 8, 32
# Bytes that are hashed or read at a time.
_PIECE = 8 * 2**20
_SEAL = "digest"
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_NO_HASH = "0" * 64


class DamagedFileError(InputError):
    """A file that is not what was written: cut off, changed, or never one of kvote's."""


def damaged(path: str | Path, why: str) -> DamagedFileError:
    """``why``: what tells that it is not as it was written, as a clause."""
    return DamagedFileError(f"{named(path)} cannot be used: {why}. Read the text again, and save it anew.")


@dataclass(frozen=True)
class Place:
    """The place of a block in the file: ``start`` is a byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    digest: str

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write(path: str | Path, facts: dict[str, Any], blocks: Mapping[str, Block]) -> int:
    """Writes ``facts`` and ``blocks`` in one file, which only its owner may read, and returns its size.

    Whatever interrupts it, there is the old file or the new one. Raises InputError where nothing can be written.
    """
    digests = dict.fromkeys(blocks, _NO_HASH)
    # Digests are known last and always equally long, so the header is written twice.
    begin = len(_header(facts, blocks, digests))
    with replacing(path, mode=0o600) as file:
        file.seek(begin)
        for name, block in blocks.items():
            digests[name] = _write_block(file, block)
        header = _header(facts, blocks, digests)
        file.write(hashlib.sha256(header).digest())
        size = file.tell()
        file.seek(0)
        file.write(header)
    return size


def _write_block(file: BinaryIO, block: Block) -> str:
    data, digest = _bytes(block.make()), hashlib.sha256()
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        digest.update(piece)
        file.write(piece)
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return _view(flat.view(torch.uint8)) if flat.numel() else memoryview(b"")


def _view(flat: Tensor) -> memoryview:
    """Bytes of a tensor uint8 [n], to read and to write."""
    data: Any = flat.numpy()
    return memoryview(data)


def _header(facts: dict[str, Any], blocks: Mapping[str, Block], digests: dict[str, str]) -> bytes:
    """The size of the header, and the header."""
    told = {"format": FORMAT, "version": str(VERSION), "facts": _json(facts), "sha256": _json(digests)}
    header: dict[str, Any] = {"__metadata__": told}
    at = 0
    for name, block in blocks.items():
        size = prod(block.shape) * block.dtype.itemsize
        header[name] = {"dtype": _NAMES[block.dtype], "shape": list(block.shape), "data_offsets": [at, at + size]}
        at += size
    header[_SEAL] = {"dtype": "U8", "shape": [_DIGEST], "data_offsets": [at, at + _DIGEST]}
    text = _json(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


class BlockFile:
    """A file that is open for reading, whose header has been checked. ``facts`` is what it says, ``places`` its blocks.

    Raises InputError for what cannot be read, DamagedFileError for what is not as it was written, and InputError for
    another version of the format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._file = open_regular(path)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.facts, self.places = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "BlockFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def damaged(self, why: str) -> DamagedFileError:
        return damaged(self.path, why)

    def tensor(self, name: str) -> Tensor:
        """A block, read whole and as it was written. Raises DamagedFileError for another one."""
        place = self.places[name]
        flat = torch.empty(place.nbytes, dtype=torch.uint8)
        view, digest = _view(flat), hashlib.sha256()
        with self._reading():
            for start in range(0, place.nbytes, _PIECE):
                piece = view[start : start + _PIECE]
                self._fill(piece, place.start + start)
                digest.update(piece)
        if digest.hexdigest() != place.digest:
            raise self.damaged(f"the bytes of its block {name!r} have changed")
        if place.dtype == torch.bool and flat.numel() and int(flat.max()) > 1:
            raise self.damaged(f"its block {name!r} holds neither yes nor no")
        return flat.view(place.dtype).view(place.shape)

    def tensors(self) -> dict[str, Tensor]:
        """All blocks, as ``tensor`` reads them, two at a time. Raises InputError if there is no memory for them."""
        needed, free = sum(place.nbytes for place in self.places.values()), memory()[1]
        if free and needed > free:
            raise InputError(f"{named(self.path)} takes {needed:,} bytes of memory, and {free:,} are free.")
        with ThreadPoolExecutor(2) as pool:
            return dict(zip(self.places, pool.map(self.tensor, self.places), strict=True))

    def check(self) -> None:
        """Reads every block and lets go of it. Raises DamagedFileError if one has changed."""
        for name in self.places:
            self.tensor(name)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (OSError, MemoryError) as error:
            why = reason(error) if isinstance(error, OSError) else "memory ran out"
            raise InputError(f"Cannot read {named(self.path)}: {why}.") from error

    def _fill(self, view: memoryview, at: int) -> None:
        while view:
            count = os.preadv(self._file.fileno(), [view], at)
            if not count:
                raise self.damaged("it has become shorter while it was read")
            view, at = view[count:], at + count

    def _bytes_at(self, start: int, count: int) -> bytes:
        data = bytearray(count)
        with self._reading():
            self._fill(memoryview(data), start)
        return bytes(data)

    def _read_header(self) -> tuple[dict[str, Any], dict[str, Place]]:
        if self.size < _SIZE + _DIGEST:
            raise self.damaged("it is too short for a header")
        start = self._bytes_at(0, _SIZE)
        (length,) = struct.unpack("<Q", start)
        if length > min(_LARGEST, self.size - _SIZE - _DIGEST):
            raise self.damaged("its header is cut off, or it is no file of kvote's")
        text = self._bytes_at(_SIZE, length)
        if hashlib.sha256(start + text).digest() != self._bytes_at(self.size - _DIGEST, _DIGEST):
            raise self.damaged("its header has changed, its end is missing, or it is no file of kvote's")
        try:
            header = strict_json(text.decode())
            return self._facts(header.pop("__metadata__")), self._places(header, _SIZE + length)
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise self.damaged("its header makes no sense") from error

    def _facts(self, told: dict[str, str]) -> dict[str, Any]:
        if told["format"] != FORMAT:
            raise self.damaged("it is no file of kvote's")
        if told["version"] != str(VERSION):
            raise InputError(
                f"{named(self.path)} is of version {told['version'][:20]!r} of the format, and this kvote reads "
                f"version {VERSION}; read the text again, and save it anew."
            )
        self._digests = strict_json(told["sha256"])
        facts = strict_json(told["facts"])
        if not isinstance(facts, dict):
            raise TypeError("no facts")
        return facts

    def _places(self, header: dict[str, Any], begin: int) -> dict[str, Place]:
        """The places of blocks: one after the other, from the header to the digest of it, without a gap."""
        compress, at, places = header.pop(_SEAL), 0, {}
        for name, held in header.items():
            dtype, shape, (start, stop) = _TYPES[held["dtype"]], tuple(held["shape"]), held["data_offsets"]
            if any(type(n) is not int or not 0 <= n <= self.size for n in (*shape, start, stop)):
                raise ValueError("no sizes")
            place = places[name] = Place(dtype, shape, begin + at, str(self._digests[name]))
            if start != at or stop != at + place.nbytes:
                raise ValueError("a gap")
            at = stop
        if compress["data_offsets"] != [at, at + _DIGEST] or begin + at + _DIGEST != self.size:
            raise self.damaged("blocks are missing")
        return places
