"""The calibration file: one JSON object that says what it is, which model it belongs to, and what was measured.

    {"format": "kvote-calibration", "version": 1, "kind": ..., "model": {fingerprint}, "data": {depends on the kind}}

Files are not trusted: nothing in them is executed, their size is bounded, and whoever uses ``data`` validates it.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvote.calibration.fingerprint import LONGEST, Fingerprint
from kvote.errors import InputError
from kvote.numbers import is_number

FORMAT, VERSION = "kvote-calibration", 1
_LARGEST = 64 * 2**20
_KEYS = {"format", "version", "kind", "model", "data"}


@dataclass(frozen=True)
class Calibration:
    """What was measured on one model. ``kind`` says what ``data`` is; ``name`` is how errors call it."""

    kind: str
    model: Fingerprint
    data: dict[str, Any]
    name: str = "the calibration"

    def __repr__(self) -> str:
        return f"<{self.kind} of a {self.model.model_type}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> "Calibration":
        # Never changed, and as large as the model has channels: copies of a cache share it.
        return self

    def check(self, model: Any) -> None:
        """Raises InputError unless it was made for ``model``, a ``PreTrainedModel``."""
        different = self.model.difference(Fingerprint.of(model))
        if different is not None:
            raise InputError(
                f"{self.name} was made for another model ({different}); calibrate this one with {command(self.kind)}."
            )


def command(kind: str) -> str:
    """What the user types to get a file of that kind."""
    return f"`kvote calibrate --model MODEL --what {kind} --out FILE`"


def load(path: str | Path, kind: str) -> Calibration:
    """Reads a calibration of that kind. Raises InputError for anything that is not one."""
    try:
        if Path(path).stat().st_size > _LARGEST:
            raise InputError(f"{path} is larger than any calibration ({_LARGEST // 2**20} MiB); is it the right file?")
        text = Path(path).read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror or error}; make it with {command(kind)}.") from error
    except UnicodeDecodeError as error:
        raise _not_one(path, "it is not UTF-8 text") from error
    try:
        held = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _not_one(path, "it is not plain JSON") from error
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise _not_one(path, f"its format is not {FORMAT!r}")
    if type(held.get("version")) is not int or held["version"] != VERSION:
        raise InputError(f"{path} is a calibration of version {held.get('version')!r}; this kvote reads {VERSION}.")
    if held.keys() != _KEYS or not isinstance(held["data"], dict):
        raise _not_one(path, f"it must hold {', '.join(sorted(_KEYS))}")
    if held["kind"] != kind:
        raise InputError(f"{path} holds {held['kind']!r}, not {kind!r}; make that with {command(kind)}.")
    return Calibration(kind, _fingerprint(held["model"], path), held["data"], str(path))


def save(calibration: Calibration, path: str | Path) -> None:
    """Writes the file all at once: a reader sees the old one or the new one. Raises InputError where it cannot."""
    target = Path(path)
    held = {
        "format": FORMAT,
        "version": VERSION,
        "kind": calibration.kind,
        "model": asdict(calibration.model),
        "data": calibration.data,
    }
    text = json.dumps(held, allow_nan=False, separators=(",", ":")) + "\n"
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _fingerprint(held: Any, path: str | Path) -> Fingerprint:
    names = [field.name for field in fields(Fingerprint)]
    if not isinstance(held, dict) or sorted(held) != sorted(names):
        raise _not_one(path, f"its model must hold {', '.join(names)}")
    for name in names:
        if not _makes_sense(name, held[name]):
            raise _not_one(path, f"{name} of its model makes no sense")
    return Fingerprint(**{**held, "sample": tuple(map(float, held["sample"]))})


def _makes_sense(name: str, value: Any) -> bool:
    if name == "model_type":
        return isinstance(value, str)
    if name == "sample":
        return isinstance(value, list) and 0 < len(value) <= LONGEST and all(map(is_number, value))
    return type(value) is int and value > 0


def _not_one(path: str | Path, why: str) -> InputError:
    return InputError(f"{path} is not a calibration of kvote: {why}.")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    if len(held) < len(pairs):
        raise ValueError("a key stands there twice")
    return held


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
