"""Chains of facts in prose, of which the last decides (the idea of bAbI and BABILong, arXiv 2406.10149)."""

import random

from kvote.eval import prose
from kvote.eval.sample import Count, Question, Sample, in_order, prose_with
from kvote.eval.tasks.facts import people

_PLACES = "orchard cellar stable library chapel greenhouse attic boathouse bakery dairy".split()
_THINGS = "lantern violin ledger saddle telescope basket umbrella compass".split()
_PEOPLE = 6


def chains(rng: random.Random, tokens: int, count: Count) -> Sample:
    """Three questions that one, two and three facts together answer: where somebody is, where a thing is that somebody
    carries, and where a thing is that was handed on. People walk about before it matters, and others do so too."""
    a, b, c, d, e, f = people(rng, _PEOPLE)
    one, two = rng.sample(_THINGS, 2)

    def walks(*names: str) -> list[str]:
        return [
            f"{name} went to the {place}." for name, place in zip(names, rng.sample(_PLACES, len(names)), strict=True)
        ]

    stories = [
        walks(a, a),
        [*walks(b), f"{b} took the {one} along.", *walks(b, b)],
        [f"{c} took the {two} along.", *walks(c, d), f"{c} handed the {two} to {d}.", *walks(c, d)],
        walks(e, f, e, f),
    ]
    told = _merged(rng, stories)
    ends = {name: _last(told, name) for name in (a, b, d)}
    questions = [
        Question(f"Where is {a} now?", (ends[a],), lead=f"{a} is now in the", room=8),
        Question(f"Where is the {one} now?", (ends[b],), lead=f"The {one} is now in the", room=8),
        Question(f"Where is the {two} now?", (ends[d],), lead=f"The {two} is now in the", room=8),
    ]
    return Sample(prose_with(rng, told, tokens, count, prose.passage(rng), in_order), tuple(questions))


def _merged(rng: random.Random, stories: list[list[str]]) -> list[str]:
    """All lines, those of each story in their order."""
    turns = [i for i, story in enumerate(stories) for _ in story]
    rng.shuffle(turns)
    left = [iter(story) for story in stories]
    return [next(left[i]) for i in turns]


def _last(told: list[str], name: str) -> str:
    return next(line for line in reversed(told) if line.startswith(f"{name} went to the")).rstrip(".").split()[-1]
