"""Tries every class of transformers' causal-LM and image-text-to-text mappings; writes docs/models.md.

Each class has a process and a time limit of its own. Records are lines of a file; a sweep that was stopped goes on from
there. Records of other sources of kvote, or of another transformers, do not count.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import transformers  # noqa: E402
from common import save  # noqa: E402
from models_page import page  # noqa: E402
from zoo.build import causal_classes, image_text_classes  # noqa: E402
from zoo.trial import trial  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classes", nargs="*", help="classes to try (default: all)")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=120, help="time limit of a class")
    parser.add_argument("--lines", type=Path, default=ROOT / "build" / "models.jsonl", help="file of records")
    parser.add_argument("--again", action="store_true", help="try classes that have a record too")
    args = parser.parse_args()
    names = args.classes or causal_classes() + image_text_classes()
    args.lines.parent.mkdir(parents=True, exist_ok=True)
    if args.again and not args.classes:
        args.lines.unlink(missing_ok=True)
    known = {} if args.again else records(args.lines)
    sweep([name for name in names if name not in known], args.workers, args.seconds, args.lines)
    found = records(args.lines)
    for name in names:
        print(line(found[name]))
    if not args.classes:
        save("models", {"classes": {name: short(found[name]) for name in names}})
        (ROOT / "docs" / "models.md").write_text(page([found[name] for name in names], set(causal_classes())))


def records(path: Path) -> dict[str, dict[str, Any]]:
    """What is known by class, with the sources as they are; of two records the later counts."""
    if not path.exists():
        return {}
    lines = [json.loads(each) for each in path.read_text().splitlines() if each.strip()]
    return {each["class"]: each for each in lines if each["sources"] == sources()}


@functools.cache
def sources() -> str:
    """What answers depend on, in a few letters."""
    digest = hashlib.sha256(transformers.__version__.encode())
    for path in sorted([*(ROOT / "kvote").rglob("*.py"), *(ROOT / "tests" / "zoo").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def sweep(names: list[str], workers: int, seconds: float, path: Path) -> None:
    """Tries ``names``, each in a process of its own, and appends a line per class."""
    context = multiprocessing.get_context("fork")
    waiting = list(names)
    running: dict[str, tuple[Any, Connection, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            name = waiting.pop(0)
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(name, theirs), daemon=True)
            process.start()
            theirs.close()
            running[name] = (process, mine, time.monotonic())
        for name, (process, pipe, began) in list(running.items()):
            late = time.monotonic() - began > seconds
            if not (pipe.poll(0.02) or late or not process.is_alive()):
                continue
            record = _received(name, pipe, process, late, seconds)
            record |= {"seconds": round(time.monotonic() - began, 1), "sources": sources()}
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            del running[name]


def _received(name: str, pipe: Connection, process: Any, late: bool, seconds: float) -> dict[str, Any]:
    try:
        if pipe.poll():
            return pipe.recv()
    except EOFError:
        pass
    finally:
        process.kill() if late else process.join(5)
    process.join(5)
    why = f"did not end within {seconds:g} s" if late else f"the process ended with code {process.exitcode}"
    return {"class": name, "built": True, "died": why}


def _work(name: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    try:
        # Some classes print.
        with contextlib.redirect_stdout(io.StringIO()):
            record = trial(name)
        pipe.send(record)
    except BaseException:
        pipe.send({"class": name, "built": True, "died": traceback.format_exc()[-600:]})


def short(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what says nothing: identical situations by that word, equal ones once."""
    kept = {key: value for key, value in record.items() if key not in ("class", "seconds", "sources")}

    def words(found: dict[str, Any]) -> dict[str, Any]:
        brief = {at: "identical" if each == {"outcome": "identical"} else each for at, each in found.items()}
        same = len(brief) > 1 and len({str(each) for each in brief.values()}) == 1
        return {"all": next(iter(brief.values()))} if same else brief

    if "methods" in kept:
        kept["methods"] = {method: words(found) for method, found in kept["methods"].items()}
        kept |= {**words({"after": kept["after"]}), "streamingllm": words(kept["streamingllm"])}
    return kept


def line(record: dict[str, Any]) -> str:
    """A record in one line, for the terminal."""
    name = record["class"]
    if "died" in record:
        return f"{name}: DIED {record['died'][-150:]}"
    if not record["built"] or not record["generates"]:
        return f"{name}: not {'generating' if record['built'] else 'built'}: {record['reason'][:160]}"
    parts = [f"{method}: {_short(found)}" for method, found in record["methods"].items()]
    parts += [f"streamingllm: {_short(record['streamingllm'])}", f"after: {_short({'': record['after']})}"]
    return f"{name} (varied {record['varied']}): " + " | ".join(parts)


def _short(found: dict[str, dict[str, str]]) -> str:
    outcomes = {each["outcome"] for each in found.values()}
    if outcomes == {"identical"}:
        return "identical"
    grouped: dict[str, list[str]] = {}
    for where, each in found.items():
        if each["outcome"] != "identical":
            grouped.setdefault(f"{each['outcome'].upper()} {each['said'][:110]}", []).append(where)
    return "; ".join(
        f"[{','.join(where) if len(where) < len(found) else 'all'}] {what}" for what, where in grouped.items()
    )


if __name__ == "__main__":
    main()
