"""The calibration file: one JSON object that says what it is, which model it belongs to, and what was measured.

    {"format": "kvote-calibration", "version": 2, "kind": ..., "model": {fingerprint}, "data": {depends on the kind}}

Files are not trusted: nothing in them is executed, their size and every count in them are bounded, and whoever uses
``data`` validates it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kvote.calibration.fingerprint import LONGEST, Fingerprint
from kvote.errors import InputError
from kvote.files import read_regular, strict_json, write_whole
from kvote.numbers import is_number

FORMAT, VERSION = "kvote-calibration", 2
_LARGEST = 32 * 2**20
# Counts that no model reaches; whoever reads a file may count up to them.
_MOST = {"layers": 1024, "heads": 65_536, "kv_heads": 65_536, "head_dim": 65_536}
# Characters of a name or value, and how many of them the rotary positions of a model may have.
_WORD, _WORDS = 100, 10_000
_SHOWN = 60
_KEYS = {"format", "version", "kind", "model", "data"}
_ALLOWED: ContextVar[bool] = ContextVar("kvote_calibration_files", default=True)


@dataclass(frozen=True)
class Calibration:
    """A measurement of one model. ``kind`` says what ``data`` is; ``name`` is how errors call it."""

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
    """The command that makes a file of that kind."""
    return f"`kvote calibrate --model MODEL --what {kind} --out FILE`"


@contextmanager
def no_files() -> Iterator[None]:
    """Within it, ``load`` and methods that write files refuse: specs that come from others must not open files here."""
    token = _ALLOWED.set(False)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def files_allowed() -> bool:
    """Whether files may be opened: not within ``no_files``."""
    return _ALLOWED.get()


def load(path: str | Path, kind: str) -> Calibration:
    """Reads a calibration of that kind. Raises InputError for anything that is not one, and within ``no_files``."""
    if not files_allowed():
        raise InputError("A calibration file cannot be named here; the operator of the server chooses such methods.")
    try:
        text = read_regular(path, _LARGEST).decode("utf-8")
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}; make it with {command(kind)}.") from error
    except UnicodeDecodeError as error:
        raise _not_one(path, "it is not UTF-8 text") from error
    try:
        held = strict_json(text)
    except (ValueError, RecursionError) as error:
        raise _not_one(path, "it is not plain JSON") from error
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise _not_one(path, f"its format is not {FORMAT!r}")
    if type(held.get("version")) is not int or held["version"] != VERSION:
        raise InputError(
            f"{path} is a calibration of version {shown(held.get('version'))}, and this kvote reads version {VERSION}; "
            f"make it anew with {command(kind)}."
        )
    if held.keys() != _KEYS or not isinstance(held["data"], dict):
        raise _not_one(path, f"it must hold {', '.join(sorted(_KEYS))}")
    if held["kind"] != kind:
        raise InputError(f"{path} holds {shown(held['kind'])}, not {kind!r}; make that with {command(kind)}.")
    return Calibration(kind, _fingerprint(held["model"], path), held["data"], str(path))


def save(calibration: Calibration, path: str | Path) -> None:
    """Writes the file all at once: a reader sees the old one or the new one. Raises InputError where it cannot."""
    held = {"format": FORMAT, "version": VERSION, **facts(calibration)}
    write_whole(path, json.dumps(held, allow_nan=False, separators=(",", ":")) + "\n")


def facts(calibration: Calibration) -> dict[str, Any]:
    """A calibration as JSON, from which ``restored`` makes it again; not where it came from."""
    model = asdict(calibration.model)
    model = {**model, "sample": list(calibration.model.sample), "rope": dict(calibration.model.rope)}
    return {"kind": calibration.kind, "model": model, "data": calibration.data}


def restored(held: Any, name: str) -> Calibration:
    """A calibration from the ``facts`` of one, which errors call ``name``. Raises InputError for what is none."""
    if not isinstance(held, dict) or held.keys() != {"kind", "model", "data"} or not isinstance(held["data"], dict):
        raise _not_one(name, "it must hold kind, model and data")
    if not isinstance(held["kind"], str) or len(held["kind"]) > _WORD:
        raise _not_one(name, "its kind makes no sense")
    return Calibration(held["kind"], _fingerprint(held["model"], name), held["data"], name)


def is_layer(name: str, layers: int) -> bool:
    """Whether it is the number of one of so many layers, as ``data`` names it."""
    return len(name) < 10 and name.isascii() and name.isdecimal() and str(int(name)) == name and int(name) < layers


def shown(value: Any) -> str:
    """Something from a file, as short as an error may be."""
    text = ascii(value) if isinstance(value, str | float | bool | None) else f"a {type(value).__name__}"
    text = str(value) if type(value) is int and abs(value) < 10**_SHOWN else text
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _fingerprint(held: Any, path: str | Path) -> Fingerprint:
    names = [field.name for field in fields(Fingerprint)]
    if not isinstance(held, dict) or sorted(held) != sorted(names):
        raise _not_one(path, f"its model must hold {', '.join(names)}")
    for name in names:
        if not _makes_sense(name, held[name]):
            raise _not_one(path, f"{name} of its model makes no sense")
    rope = tuple(sorted(held["rope"].items()))
    return Fingerprint(**{**held, "sample": tuple(map(float, held["sample"])), "rope": rope})


def _makes_sense(name: str, value: Any) -> bool:
    if name == "model_type":
        return isinstance(value, str) and len(value) <= _WORD and value.isprintable()
    if name == "rope":
        words: list[Any] = [word for pair in value.items() for word in pair] if isinstance(value, dict) else [None]
        return all(isinstance(word, str) and word.isprintable() for word in words) and len("".join(words)) <= _WORDS
    if name == "sample":
        return isinstance(value, list) and 0 < len(value) <= LONGEST and all(map(is_number, value))
    return type(value) is int and 0 < value <= _MOST[name]


def _not_one(path: str | Path, why: str) -> InputError:
    return InputError(f"{path} is not a calibration of kvote: {why}.")
