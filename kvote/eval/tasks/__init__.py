"""The tasks, by name. Each makes a sample from random numbers, a length in tokens and a way to count tokens."""

import random
from collections.abc import Callable

from kvote.errors import InputError
from kvote.eval.sample import Count, Sample
from kvote.eval.tasks.book import perplexity
from kvote.eval.tasks.chains import chains
from kvote.eval.tasks.facts import facts
from kvote.eval.tasks.needles import NEEDLES
from kvote.eval.tasks.turns import turns
from kvote.eval.tasks.variables import variables
from kvote.eval.tasks.words import common, frequent
from kvote.eval.tasks.world import world, world_turns
from kvote.eval.tasks.writing import copying, counting

Task = Callable[[random.Random, int, Count], Sample]

# In prose, for models that read English.
PROSE: dict[str, Task] = {
    **NEEDLES,
    "vt": variables,
    "cwe": common,
    "fwe": frequent,
    "facts": facts,
    "chains": chains,
    "turns": turns,
    "perplexity": perplexity,
}
# Answers as long as the length asked for, or half of it: not measured unless named, for they take long.
WRITING: dict[str, Task] = {"counting": counting, "copying": copying}
TASKS: dict[str, Task] = {**PROSE, **WRITING, "world": world, "world_turns": world_turns}


def task_named(name: str) -> Task:
    """The task of that name. Raises InputError if there is none."""
    if name not in TASKS:
        raise InputError(f"There is no task {name!r}; there are {', '.join(TASKS)}.")
    return TASKS[name]
