"""What a task makes: a document and questions about it, or a text whose continuation is scored."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvote.errors import InputError

Count = Callable[[str], int]


@dataclass(frozen=True)
class Question:
    """``answers``: what has to come: all of them where ``score`` is 'all', one where it is 'any', the first alone where
    it is 'exact', one after the other from the start where it is 'run'; 'classes' and the names of ``METRICS`` are the
    scores of published benchmarks, of which the answer met best counts. ``classes``: all that there are; ``one_line``:
    only the first line of what is said counts.

    ``lead``: the beginning of the answer, put into the model's mouth; ``room``: tokens that an answer may take.
    """

    text: str
    answers: tuple[str, ...]
    score: str = "all"
    lead: str = ""
    room: int = 32
    classes: tuple[str, ...] = ()
    one_line: bool = False


@dataclass(frozen=True)
class Sample:
    """A document, and the questions that each see it alone; ``turns``: each sees those before it and their answers.

    ``continuation``: text behind the document whose likelihood is measured token by token, in place of questions.
    """

    document: str
    questions: tuple[Question, ...] = ()
    continuation: str | None = None
    turns: bool = False


def rng_of(seed: int, task: str, length: int, index: int) -> random.Random:
    """Random numbers that depend on the sample alone, not on the order in which samples are made."""
    return random.Random(f"{seed} {task} {length} {index}")


def most(parts: Sequence[str], tokens: int, count: Count, glue: str = " ") -> int:
    """How many of the first ``parts`` hold at most ``tokens`` tokens together. Raises InputError if not even one does,
    or all of them do not fill half of it."""
    low, high = 0, 1
    while high < len(parts) and count(glue.join(parts[:high])) <= tokens:
        low, high = high, min(len(parts), 2 * high)
    if high == len(parts) and count(glue.join(parts)) <= tokens:
        low = high
    while high - low > 1:
        middle = (low + high) // 2
        if count(glue.join(parts[:middle])) <= tokens:
            low = middle
        else:
            high = middle
    if low < 1:
        raise InputError(f"A document of {tokens:,} tokens has no room for this task; give a larger --lengths.")
    return low


def strewn(rng: random.Random, hay: list[str], needles: Sequence[str]) -> list[str]:
    """``hay`` with each needle put in at a random place, not before the first sentence."""
    out = list(hay)
    for needle in needles:
        out.insert(rng.randint(1, len(out)), needle)
    return out


def in_order(rng: random.Random, hay: Sequence[str], told: Sequence[str]) -> list[str]:
    """``hay`` with the lines of ``told`` put in at random places, in their order, not before the first sentence."""
    gaps = range(1, len(hay) + 1)
    # Lines follow one another only where there are more of them than gaps.
    places = sorted(rng.sample(gaps, len(told)) if len(told) <= len(gaps) else rng.choices(gaps, k=len(told)))
    out = list(hay)
    for place, line in reversed(list(zip(places, told, strict=True))):
        out.insert(place, line)
    return out


def prose_with(
    rng: random.Random,
    needles: Sequence[str],
    tokens: int,
    count: Count,
    hay: Sequence[str],
    put: Callable[[random.Random, list[str], Sequence[str]], list[str]] = strewn,
) -> str:
    """As much of ``hay`` as leaves room for ``needles`` among ``tokens`` tokens, with the needles ``put`` into it."""
    room = tokens - count(" ".join(needles))
    if room < tokens // 8:
        raise InputError(f"A document of {tokens:,} tokens has no room for this task; give a larger --lengths.")
    return " ".join(put(rng, list(hay[: most(hay, room, count)]), needles))
