"""A model's config: found, read and bounded before a model is made of it. No weights are needed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from kvote.errors import InputError
from kvote.files import read_regular

_LARGEST = 16 * 2**20
# A config may ask for any number of modules, and every one of them takes time and memory to make.
_MOST = {
    re.compile(r"(n|num|.*_num|.*_n)_.*layers?|.*_layers|layers|depths?"): 1024,
    re.compile(r"(n|num|.*_num|.*_n)_.*experts?"): 4096,
    re.compile(r"(n|num|.*_num|.*_n)_.*heads?"): 65_536,
    # An axis of a weight, a row of which is made to be timed.
    re.compile(r".*(size|dim|width|embd|d_model|positions)"): 2**24,
}


def load_config(name: str) -> Any:
    """The config that a hub name, a folder or a file holds. Raises InputError where there is none that makes sense."""
    path, source = _path(name), name
    if path is not None:
        file = path / "config.json" if path.is_dir() else path
        if path.is_dir() and not file.exists():
            raise InputError(f"Cannot read a config from {name!r}: the folder holds no config.json.")
        held = _json(file)
        source = str(path)
    try:
        if path is None:
            held = PreTrainedConfig.get_config_dict(name)[0]
        check_bounds(held)
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"Cannot read a config from {name!r}: {reason(error)}") from error


def check_bounds(held: Any) -> None:
    """Raises InputError for a config that counts more than any model has. ``held``: what its JSON file holds."""
    for name, value in _numbers(held):
        most = next((most for counted, most in _MOST.items() if counted.fullmatch(name)), None)
        if most is not None and value > most:
            raise InputError(f"The config's {name} of {_short(value)} is more than any model has (at most {most:,}).")


def reason(error: Exception) -> str:
    """What an exception of transformers says, on one line; of two the second says what the first announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _short(value: int) -> str:
    """A number of any length; Python refuses to write the digits of very long ones."""
    return f"{value:,}" if value < 10**12 else f"some 2 to the {value.bit_length() - 1}"


def _path(name: str) -> Path | None:
    """The file or folder of that name; None for what can only be a name on the hub."""
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"There is no config at {name!r}: {reason(error)}") from error
    if not name.strip() or name.startswith((".", "/", "~")) or name.endswith(".json"):
        raise InputError(f"There is no config at {name or repr(name)}.")
    return None


def _json(file: Path) -> Any:
    try:
        held = json.loads(read_regular(file, _LARGEST).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"Cannot read a config from {str(file)!r}: it is not JSON.") from error
    if not isinstance(held, dict):
        raise InputError(f"Cannot read a config from {str(file)!r}: it is not a JSON object.")
    return held


def _numbers(held: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Every whole number with the name that it stands under."""
    if isinstance(held, dict):
        for key, value in held.items():
            yield from _numbers(value, str(key))
    elif isinstance(held, list):
        for value in held:
            yield from _numbers(value, name)
    elif isinstance(held, int) and not isinstance(held, bool):
        yield name, held
