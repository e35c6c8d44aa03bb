"""The tasks, by name. Each makes a sample from random numbers, a length in tokens and a way to count tokens."""

import random
from collections.abc import Callable

from kvote.errors import InputError
from kvote.eval.sample import Count, Sample
from kvote.eval.tasks.book import perplexity
from kvote.eval.tasks.facts import facts
from kvote.eval.tasks.needles import NEEDLES
from kvote.eval.tasks.variables import variables
from kvote.eval.tasks.words import common, frequent
from kvote.eval.tasks.world import world

Task = Callable[[random.Random, int, Count], Sample]

# In prose, for models that read English.
PROSE: dict[str, Task] = {
    **NEEDLES,
    "vt": variables,
    "cwe": common,
    "fwe": frequent,
    "facts": facts,
    "perplexity": perplexity,
}
TASKS: dict[str, Task] = {**PROSE, "world": world}


def task_named(name: str) -> Task:
    """The task of that name. Raises InputError if there is none."""
    if name not in TASKS:
        raise InputError(f"There is no task {name!r}; there are {', '.join(TASKS)}.")
    return TASKS[name]
