"""Tasks from files of published benchmarks that lie on this machine; nothing is ever fetched."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvote.errors import InputError
from kvote.eval.files import helmet, infinitebench, longbench, longbench2, question_answering
from kvote.eval.files.lines import LARGEST, Assembled
from kvote.eval.sample import Sample
from kvote.files import named, read_regular

Reader = Callable[[Path, bytes], tuple[Sample, ...] | Assembled]
FORMATS: dict[str, Reader] = {
    "longbench": longbench.read,
    "longbench2": longbench2.read,
    "infinitebench": infinitebench.read,
    "helmet": helmet.read,
    "squad": question_answering.squad,
    "hotpotqa": question_answering.hotpotqa,
}
# RULER's names for the two tasks that need a data set.
_RULER = {"squad": "qa_1", "hotpotqa": "qa_2"}
_ENDINGS = (".jsonl", ".json")


@dataclass(frozen=True)
class FileTask:
    """A task of a file. ``held``: its samples, or what makes one of any length; ``sha256`` of the file."""

    name: str
    sha256: str
    held: tuple[Sample, ...] | Assembled


@cache
def file_tasks(given: str) -> tuple[FileTask, ...]:
    """Tasks of ``given``, which is FORMAT=FILE or FORMAT=FOLDER. Raises InputError for what is none, or damaged."""
    kind, found, place = given.partition("=")
    if not found or kind not in FORMATS:
        raise InputError(f"--files takes FORMAT=PATH with one of {', '.join(FORMATS)}; got {given!r}.")
    path = Path(place)
    files = sorted(one for one in path.iterdir() if one.suffix in _ENDINGS) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{named(path)} holds no file that ends in {' or '.join(_ENDINGS)}.")
    return tuple(_task(kind, file) for file in files)


def _task(kind: str, file: Path) -> FileTask:
    data = read_regular(file, LARGEST)
    held = FORMATS[kind](file, data)
    name = _RULER.get(kind, f"{kind}:{file.stem}")
    return FileTask(name, hashlib.sha256(data).hexdigest(), held)
