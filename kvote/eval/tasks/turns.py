"""A talk about a document, in which questions refer to earlier ones (the setting of SCBench, arXiv 2412.10319)."""

import random

from kvote.eval import prose
from kvote.eval.sample import Count, Question, Sample, prose_with
from kvote.eval.tasks.facts import KINDS, people

# Who is asked about: by name, or as one of an earlier question, which only the talk says.
_AGAIN, _FIRST = "that same person", "the person I asked about first"


def turns(rng: random.Random, tokens: int, count: Count) -> Sample:
    """Three facts about each of two people in a novel, asked for in four turns: about one of them, about 'that same
    person', about the other, and about 'the person I asked about first'."""
    told: dict[tuple[str, int], str] = {}
    names, kinds = people(rng, 2), rng.sample(KINDS, 3)
    for number, (_, _, _, values) in enumerate(kinds):
        for name, value in zip(names, rng.sample(values, 2), strict=True):
            told[name, number] = value
    one, other = names
    asked = [(one, 0, one), (one, 1, _AGAIN), (other, 0, other), (one, 2, _FIRST)]
    questions = [
        Question(kinds[kind][1].format(said), (told[name, kind],), lead=_upper(kinds[kind][2].format(said)), room=10)
        for name, kind, said in asked
    ]
    needles = [kinds[kind][0].format(name, value) for (name, kind), value in told.items()]
    document = prose_with(rng, needles, tokens, count, prose.passage(rng))
    return Sample(document, tuple(questions), turns=True)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
