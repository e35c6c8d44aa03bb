"""What is to be measured: every task, length and sample with every method and budget, each under a key of its own."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kvote.errors import InputError
from kvote.eval.files import FileTask, file_tasks
from kvote.eval.files.lines import Assembled
from kvote.eval.sample import Count, Sample, rng_of
from kvote.eval.tasks import task_named
from kvote.eval.tasks.book import POSITIONS
from kvote.method import METHODS
from kvote.spec import parse

# Parameters that say how much a method keeps or reads, in the order in which one is looked for.
_SIZES = ("budget", "token_budget", "top_k", "window")
# Parameters of tokens that are read beside those.
_BESIDE = ("sinks", "window")


@dataclass(frozen=True)
class Unit:
    """One sample, to be measured with every one of ``specs`` (by the name it is listed under)."""

    task: str
    length: int
    index: int
    specs: tuple[tuple[str, str], ...]
    question_first: bool = False

    def key(self, name: str) -> str:
        """Under which the record of a method is found again."""
        asked = "/question first" if self.question_first else ""
        return f"{self.task}/{self.length}/{self.index}/{name}{asked}"


@dataclass(frozen=True)
class Plan:
    """``methods`` are specs; ``budgets`` are tokens, or shares of the document's, that each is given in turn.

    ``files``: FORMAT=PATH of benchmarks that lie here; ``chosen``: numbers of the samples of a file's task that are
    measured at a length (``with_rows``). ``question_first``: a document is read anew with each question, as one prompt.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    methods: tuple[str, ...]
    budgets: tuple[float, ...] = ()
    seed: int = 0
    files: tuple[str, ...] = ()
    chosen: tuple[tuple[str, int, tuple[int, ...]], ...] = ()
    question_first: bool = False

    def file_tasks(self) -> dict[str, FileTask]:
        """Tasks of the files by name. Raises InputError if one cannot be read, or two are called alike."""
        found: dict[str, FileTask] = {}
        for task in (task for given in self.files for task in file_tasks(given)):
            if task.name in found:
                raise InputError(f"Two files are called {task.name}; give each to a folder of results of its own.")
            found[task.name] = task
        return found

    def units(self) -> Iterator[Unit]:
        """Sample by sample over all tasks and lengths, so that a run which is stopped has something of each. Of a book
        there are ``POSITIONS`` at least."""
        least = {"perplexity": POSITIONS}
        rows = {(name, length): held for name, length, held in self.chosen}
        made = [*self.tasks, *(name for name, task in self.file_tasks().items() if isinstance(task.held, Assembled))]
        for index in range(max([self.samples, *least.values()])):
            for length in self.lengths:
                specs = tuple(self._specs(length))
                for task in made:
                    if index < max(self.samples, least.get(task, 0)):
                        yield Unit(task, length, index, specs, self.question_first)
                for (name, size), held in rows.items():
                    if size == length and index < len(held):
                        yield Unit(name, length, held[index], specs, self.question_first)

    def _specs(self, length: int) -> Iterator[tuple[str, str]]:
        for spec in self.methods:
            sized = [(spec, spec)]
            if self.budgets and spec != "dense":
                sized = [(f"{spec} @ {budget:g}", with_budget(spec, budget, length)) for budget in self.budgets]
            yield from sized

    def check(self) -> None:
        """Raises InputError or MethodError for what makes no sense, before anything is loaded."""
        for task in self.tasks:
            task_named(task)
        self.file_tasks()
        for length in self.lengths:
            for _, spec in self._specs(length):
                parse(spec)


def make(unit: Unit, seed: int, count: Count, files: Mapping[str, FileTask] | None = None) -> Sample:
    """The sample of ``unit``: the same for every method, and whatever else is measured."""
    rng, held = rng_of(seed, unit.task, unit.length, unit.index), (files or {}).get(unit.task)
    if held is None:
        return task_named(unit.task)(rng, unit.length, count)
    if isinstance(held.held, Assembled):
        return held.held.make(rng, unit.length, count)
    return held.held[unit.index]


def with_budget(spec: str, budget: float, length: int) -> str:
    """``spec`` with a budget in tokens for the parameter that says how much it keeps or reads; sinks and a window that
    are read beside it count. A budget up to 1 is a share of ``length``. Raises InputError where there is no such
    parameter, it is given already, or nothing is left for it."""
    name, _, given = spec.strip().partition("(")
    parse(spec)
    if "|" in spec or name not in METHODS:
        raise InputError(f"A budget is given to a single method; write it into {spec!r}, and leave out --budgets.")
    known = inspect.signature(METHODS[name].build).parameters
    size = next((size for size in _SIZES if size in known), None)
    if size is None or f"{size}=" in given.replace(" ", ""):
        why = "has no budget" if size is None else f"is given its {size} already"
        raise InputError(f"{spec} {why}; leave out --budgets, or the method.")
    tokens = int(budget * length) if budget <= 1 else int(budget)
    beside = 0
    if size in ("top_k", "window"):
        written = dict(part.strip().split("=") for part in given.rstrip(")").split(",") if "=" in part)
        for other in _BESIDE:
            if other in known and other != size:
                beside += int(written.get(other, known[other].default))
    if tokens - beside < 1:
        raise InputError(
            f"A budget of {tokens:,} tokens leaves nothing beside the {beside:,} that {spec} always reads."
        )
    inner = given.rstrip().removesuffix(")")
    return f"{name}({f'{inner}, ' if inner else ''}{size}={tokens - beside})"
