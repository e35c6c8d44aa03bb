"""The folder of a run: manifest.json says what was measured and how, samples.jsonl holds a record per line."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from kvote.errors import InputError
from kvote.files import check_folder, named, write_whole

MANIFEST, SAMPLES = "manifest.json", "samples.jsonl"
# What records in one folder must have in common; versions and machines may differ, and are listed run by run.
_SAME = ("model_sha256", "tokenizer_sha256", "dtype", "template", "stop_ids", "seed", "text_sha256", "format", "asked")
_CALLED = {"asked": "way of asking"}
FORMAT = 1

Record = dict[str, Any]


def open_folder(path: str | Path, manifest: Record) -> None:
    """Writes the manifest, or adds this run to the one that is there. Raises InputError if what was measured in this
    folder cannot be compared with what is to come, or nothing can be written."""
    folder = Path(path)
    check_folder(folder)
    held = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if held is None:
        if (folder / SAMPLES).exists():
            raise InputError(f"{named(folder)} holds {SAMPLES} without {MANIFEST}; give another --out.")
        held = {key: manifest[key] for key in manifest if key != "run"} | {"runs": []}
    for key in _SAME:
        if held.get(key) != manifest.get(key):
            what = _CALLED.get(key, key.replace("_", " "))
            raise InputError(
                f"{named(folder)} was measured with another {what}, and samples would not compare; give another --out."
            )
    for run in held["runs"]:
        for name, digest in run.get("files", {}).items():
            if manifest["run"].get("files", {}).get(name, digest) != digest:
                raise InputError(f"{named(folder)} was measured with another file of {name}; give another --out.")
    held["runs"].append(manifest["run"])
    write_whole(folder / MANIFEST, json.dumps(held, indent=1))


def read_manifest(folder: Path) -> Record:
    """Raises InputError for what is none."""
    try:
        held = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read {named(folder / MANIFEST)}: {error}.") from error
    if not isinstance(held, dict) or held.get("format") != FORMAT or not isinstance(held.get("runs"), list):
        raise InputError(f"{named(folder / MANIFEST)} is no manifest of kvote eval.")
    return held


def read_records(path: str | Path) -> dict[str, Record]:
    """Records by key; a last line that a crash cut off is left out. Raises InputError for any other fault."""
    file = Path(path) / SAMPLES
    try:
        lines = file.read_bytes().split(b"\n") if file.exists() else []
    except OSError as error:
        raise InputError(f"Cannot read {named(file)}: {error.strerror}.") from error
    found: dict[str, Record] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            found[record["key"]] = record
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                # No newline behind it: it was being written.
                continue
            raise InputError(f"Line {number} of {named(file)} is no record of kvote eval.") from error
    return found


@contextmanager
def appending(path: str | Path) -> Iterator[IO[bytes]]:
    """The samples, open at the end of the last whole line. Raises InputError while another process writes there."""
    file = Path(path) / SAMPLES
    try:
        with open(file, "ab+") as out:
            _claim(out, file)
            out.seek(0)
            data = out.read()
            if not data.endswith(b"\n"):
                out.truncate(data.rfind(b"\n") + 1)
            yield out
    except OSError as error:
        raise InputError(f"Cannot write {named(file)}: {error.strerror}.") from error


def append(out: IO[bytes], record: Record) -> None:
    """One line, on the disk when this returns."""
    out.write(json.dumps(record, allow_nan=True).encode() + b"\n")
    out.flush()
    os.fsync(out.fileno())


def _claim(out: IO[bytes], file: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(out.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(f"Another kvote eval writes into {named(file)}; give another --out.") from error
