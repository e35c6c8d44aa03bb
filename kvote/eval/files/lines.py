"""Records of JSON files of others, read strictly: what is malformed is said in one sentence."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvote.errors import InputError
from kvote.eval.sample import Count, Sample
from kvote.files import named, strict_json

LARGEST = 2 * 2**30


@dataclass(frozen=True)
class Assembled:
    """Samples of any length, made from what a file holds."""

    make: Callable[[random.Random, int, Count], Sample]


@dataclass(frozen=True)
class Record:
    """An object of a file, and ``where`` it stands, for what is said about it."""

    held: dict[str, Any]
    where: str

    def text(self, key: str) -> str:
        """Raises InputError where there is no text under ``key``."""
        found = self.held.get(key)
        if not isinstance(found, str):
            raise self.wrong(f"has no text under {key!r}")
        return found

    def texts(self, key: str) -> tuple[str, ...]:
        """Texts or numbers of a list, or one alone. Raises InputError for anything else, and if there are none."""
        found = self.held.get(key)
        listed = found if isinstance(found, list) else [found]
        fine = all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in listed)
        if not listed or not fine:
            raise self.wrong(f"has no texts under {key!r}")
        return tuple(str(one) for one in listed)

    def wrong(self, why: str) -> InputError:
        return InputError(f"{self.where} {why}.")


def records(path: Path, data: bytes) -> Iterator[Record]:
    """Objects of a file of lines, or of a JSON list (``.json``; one under "data" too). Raises InputError for anything
    else, and if there are none."""
    count = 0
    if path.suffix == ".json":
        whole = parsed(path, data)
        whole = whole.get("data") if isinstance(whole, dict) else whole
        if not isinstance(whole, list):
            raise InputError(f"{named(path)} holds no list of records.")
        for count, held in enumerate(whole, 1):
            yield _record(held, f"Record {count} of {named(path)}")
    else:
        for number, line in enumerate(_decoded(path, data).split("\n"), 1):
            if line.strip():
                where, count = f"Line {number} of {named(path)}", count + 1
                try:
                    held = strict_json(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{where} is no JSON: {error}.") from error
                yield _record(held, where)
    if not count:
        raise InputError(f"{named(path)} holds no records.")


def parsed(path: Path, data: bytes) -> Any:
    """A whole file of JSON. Raises InputError."""
    try:
        return strict_json(_decoded(path, data))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{named(path)} is no JSON: {error}.") from error


def _record(held: Any, where: str) -> Record:
    if not isinstance(held, dict):
        raise InputError(f"{where} is no JSON object.")
    return Record(held, where)


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{named(path)} is no UTF-8 text: byte {error.start:,} is none.") from error
