"""Runs a plan: in this process, or in several that each hold the model."""

import multiprocessing
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kvote.errors import KvoteError
from kvote.eval.folder import Record, append, appending, read_records
from kvote.eval.measure import Reference, measure
from kvote.eval.plan import Plan, Unit, make
from kvote.eval.subject import Subject

Load = Callable[[], Subject]
Tell = Callable[[Record], None]
# Samples, each with the names of the methods that are missing.
Todo = list[tuple[Unit, tuple[str, ...]]]
# Another way to measure them: so many at a time.
Elsewhere = Callable[[Plan, Todo, Load, int], Iterator[Record]]

_WAIT_SECONDS = 1.0


def pending(plan: Plan, folder: str | Path) -> Todo:
    """Units that are not done, each with the names of its methods that are missing."""
    done = read_records(folder)
    found = []
    for unit in plan.units():
        names = tuple(name for name, _ in unit.specs if unit.key(name) not in done)
        if names:
            found.append((unit, names))
    return found


def run(
    plan: Plan,
    folder: str | Path,
    load: Load,
    *,
    workers: int = 1,
    tell: Tell = lambda record: None,
    elsewhere: Elsewhere | None = None,
) -> int:
    """Measures what is missing and returns how many records came; each is written before ``tell`` hears of it."""
    todo, count = pending(plan, folder), 0
    with appending(folder) as out:
        for record in (elsewhere or (_here if workers == 1 else _beside))(plan, todo, load, workers):
            append(out, record)
            count += 1
            tell(record)
    return count


def records_of(plan: Plan, unit: Unit, names: Sequence[str], subject: Subject) -> Iterator[Record]:
    """A record for each of the methods; where likelihoods are compared, dense attention comes first."""
    sample, reference = make(unit, plan.seed, subject.count, plan.file_tasks()), Reference()
    if sample.continuation is not None and "dense" not in names:
        measure(subject, sample, "dense", reference, question_first=unit.question_first)
    ordered = [pair for pair in unit.specs if pair[0] in names]
    for name, spec in sorted(ordered, key=lambda pair: pair[1] != "dense"):
        begin = time.perf_counter()
        told = measure(subject, sample, spec, reference, question_first=unit.question_first)
        yield {
            "key": unit.key(name),
            "task": unit.task,
            "length": unit.length,
            "index": unit.index,
            "name": name,
            "method": spec,
            **told,
            "seconds": round(time.perf_counter() - begin, 3),
        }


def _here(plan: Plan, todo: Todo, load: Load, workers: int) -> Iterator[Record]:
    subject = load() if todo else None
    for unit, names in todo:
        assert subject is not None
        yield from records_of(plan, unit, names, subject)


def _beside(plan: Plan, todo: Todo, load: Load, workers: int) -> Iterator[Record]:
    """Processes share a queue of units, the costliest first. Raises KvoteError if one of them dies."""
    context = multiprocessing.get_context("spawn")
    given: Any = context.Queue()
    heard: Any = context.Queue()
    for item in sorted(todo, key=lambda item: -item[0].length):
        given.put(item)
    threads = max(1, torch.get_num_threads() // workers)
    crew = [
        context.Process(target=_work, args=(plan, load, threads, given, heard), daemon=True)
        for _ in range(min(workers, len(todo)))
    ]
    for _ in crew:
        given.put(None)
    for process in crew:
        process.start()
    try:
        left = len(crew)
        while left:
            try:
                told = heard.get(timeout=_WAIT_SECONDS)
            except queue.Empty:
                dead = [process.exitcode for process in crew if process.exitcode not in (None, 0)]
                if dead:
                    raise KvoteError(
                        f"A worker of kvote eval died with exit code {dead[0]}; what was measured is kept, and the "
                        "same command goes on from there."
                    ) from None
                continue
            if told is None:
                left -= 1
            elif isinstance(told, Exception):
                raise told
            else:
                yield told
    finally:
        for process in crew:
            process.terminate()
            process.join()


def _work(plan: Plan, load: Load, threads: int, given: Any, heard: Any) -> None:
    try:
        torch.set_num_threads(threads)
        subject = load()
        while (item := given.get()) is not None:
            unit, names = item
            for record in records_of(plan, unit, names, subject):
                heard.put(record)
        heard.put(None)
    except KvoteError as error:
        heard.put(error)
    except KeyboardInterrupt:
        pass
