"""Where a model comes from: a hub name, or a folder whose files can be read into memory."""

import os
import stat

from kvote.cli.room import gib
from kvote.env import memory
from kvote.errors import InputError
from kvote.files import irregular, reason

# Suffixes of the files in a model's folder that transformers opens.
_READ = (".json", ".safetensors", ".model", ".txt", ".jinja")


def source_of(name: str) -> str:
    """The hub name or the folder. Raises InputError for what is neither, and for a folder that cannot be read."""
    if not name.strip():
        raise InputError("The model's name is empty; give a hub name or a folder.")
    folder = os.path.expanduser(name)
    try:
        if stat.S_ISDIR(os.stat(folder).st_mode):
            _check(folder)
            return folder
    except InputError:
        raise
    except FileNotFoundError:
        if name.startswith((".", "/", "~")):
            raise InputError(f"There is no model folder {name}.") from None
        return name
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read the model {name}: {reason(error)}.") from error
    raise InputError(f"{name} is not the folder of a model; give that.")


def _check(folder: str) -> None:
    """A FIFO never begins, a device never ends. What is missing is left to transformers, which knows what it needs."""
    weights, free = 0, memory()[1]
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
    if free and weights > free:
        raise InputError(f"The weights in {folder} take {gib(weights)} GiB, and {gib(free)} GiB of memory are free.")
