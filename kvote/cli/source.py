"""The source of a model: a hub name, or a folder or GGUF file that fits into memory."""

import os
import stat
from importlib.util import find_spec

from kvote.cli.room import gib
from kvote.env import memory
from kvote.errors import InputError
from kvote.files import irregular, reason

_MAGIC = b"GGUF"
# Suffixes of the files in a model's folder that transformers opens.
_READ = (".json", ".safetensors", ".model", ".txt", ".jinja")


def source_of(name: str) -> tuple[str, str | None]:
    """The hub name or folder, and the name of the GGUF file in it that is meant, None for weights in safetensors.

    Raises InputError for what is none of these, and for what cannot be read.
    """
    if not name.strip():
        raise InputError("The model's name is empty; give a hub name, a folder or a GGUF file.")
    folder = os.path.expanduser(name)
    try:
        found = os.stat(folder)
        if stat.S_ISDIR(found.st_mode):
            _check(folder)
            return folder, None
        if stat.S_ISREG(found.st_mode) and name.lower().endswith(".gguf"):
            _check_gguf(folder, found.st_size)
            return os.path.dirname(folder) or ".", os.path.basename(folder)
    except InputError:
        raise
    except FileNotFoundError:
        if name.startswith((".", "/", "~")):
            raise InputError(f"There is no model folder {name}.") from None
        return name, None
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read the model {name}: {reason(error)}.") from error
    raise InputError(f"{name} is not the folder of a model, nor a GGUF file; give one of these.")


def _check_gguf(path: str, size: int) -> None:
    with open(path, "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise InputError(f"{path} is not a GGUF file, whatever its name says.")
    if find_spec("gguf") is None:
        raise InputError("GGUF files are read with the package gguf; install it: pip install 'kvote[gguf]'.")
    _check_room(path, size)


def _check(folder: str) -> None:
    """A FIFO never begins, a device never ends. What is missing is left to transformers, which knows what it needs."""
    weights = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith(_READ):
                continue
            try:
                found = os.stat(entry.path)
            except FileNotFoundError:
                continue
            if not stat.S_ISDIR(found.st_mode) and (kind := irregular(found)):
                raise InputError(f"Cannot read the model {folder}: {entry.name} is {kind}, not a file.")
            if entry.name.startswith("model") and entry.name.endswith(".safetensors"):
                weights += found.st_size
    _check_room(folder, weights)


def _check_room(name: str, weights: int) -> None:
    free = memory()[1]
    if free and weights > free:
        raise InputError(f"The weights in {name} take {gib(weights)} GiB, and {gib(free)} GiB of memory are free.")
