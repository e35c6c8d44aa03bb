"""Variable tracking (RULER, arXiv 2404.06654): which variables hold a number, through a chain of assignments."""

import random
import string
from itertools import pairwise

from kvote.eval.sample import Count, Question, Sample, in_order, prose_with
from kvote.eval.tasks.needles import _NOISE

_HOPS = 4
_EXAMPLE_HAY = 6


def _chain(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """The number, the names that hold it, and the assignments in their order."""
    number = str(rng.randrange(10**4, 10**5))
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    told = [f"VAR {names[0]} = {number}."]
    told += [f"VAR {b} = VAR {a}." for a, b in pairwise(names)]
    return number, names, told


def _lead(number: str, names: int) -> str:
    return f"The {names} variables that hold the value {number} are:"


def variables(rng: random.Random, tokens: int, count: Count) -> Sample:
    """A chain of five names in noise, behind a short solved example."""
    number, names, told = _chain(rng)
    shown, shown_names, shown_told = _chain(rng)
    noise = [_NOISE[i % len(_NOISE)] for i in range(max(64, 2 * tokens))]
    solved = " ".join(in_order(rng, noise[:_EXAMPLE_HAY], shown_told))
    example = (
        f"Example text: {solved}\n"
        f"Example question: Which variables hold the value {shown}?\n"
        f"Example answer: {_lead(shown, len(names))} {' '.join(shown_names)}\n\n"
    )
    # The room that the chain needs is found with it in random places; its order is made right afterwards.
    sized = prose_with(rng, told, tokens - count(example), count, noise)
    hay = noise[: sum(sized.count(line) for line in _NOISE)]
    question = Question(
        f"Which variables hold the value {number}? Follow the chain of assignments in the text and name all of them.",
        tuple(names),
        lead=_lead(number, len(names)),
        room=40,
    )
    document = " ".join(in_order(rng, hay, told))
    return Sample(f"{example}Remember the chain of assignments in this text.\n\n{document}", (question,))
