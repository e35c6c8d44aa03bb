"""Facts in prose, asked for in other words than they were told in (the idea of NoLiMa, arXiv 2502.05167)."""

import random

from kvote.eval import prose
from kvote.eval.sample import Count, Question, Sample, prose_with

ASKED = 5
_FIRST = (
    "Tobias Agnes Rufus Mabel Silas Edith Hugo Nora Percy Ivy Otto Clara Felix Greta Linus Hester Amos Della".split()
)
_LAST = (
    "Fenwick Garland Pomeroy Whitlock Draycott Sorrel Kimble Larkin Mossop Treadwell Quill Underhay Vesey Yarrow "
    "Bramwell Tolliver Hackett Ormond"
).split()
# How it is told, how it is asked, how the answer begins, and what it may be; {} is the name, then the value.
KINDS = (
    (
        "{}, it was said, never went anywhere without a small {} on a lead.",
        "Which animal accompanied {}?",
        "{} was accompanied by a",
        "ferret tortoise badger goose monkey fox hedgehog donkey".split(),
    ),
    (
        "By trade {} was a {}, and proud of it.",
        "How did {} earn a living?",
        "{} earned a living as a",
        "clockmaker butcher locksmith tailor cobbler printer glazier cooper".split(),
    ),
    (
        "In the spring {} moved for good to {}, by the sea.",
        "Where does {} live now?",
        "{} now lives in",
        "Lisbon Naples Dublin Oslo Athens Tangier Bergen Valencia".split(),
    ),
    (
        "Nothing could be served to {} that had {} in it, for it brought on a dreadful rash.",
        "What food must {} avoid?",
        "The food that {} must avoid is",
        "walnuts celery mustard oysters strawberries garlic cinnamon almonds".split(),
    ),
    (
        "Every evening after dinner {} took up the {} and played until the candles were out.",
        "What instrument does {} practise?",
        "{} practises the",
        "cello flute trumpet harp bassoon mandolin oboe accordion".split(),
    ),
    (
        "The front door of the house where {} grew up had been painted {} by a grandfather.",
        "What colour was the entrance of the childhood home of {}?",
        "The colour of that entrance, in the childhood of {}, was",
        "purple orange yellow green turquoise scarlet silver pink".split(),
    ),
)


def people(rng: random.Random, count: int) -> list[str]:
    """Names of ``count`` people, none of which shares a word with another."""
    return [f"{a} {b}" for a, b in zip(rng.sample(_FIRST, count), rng.sample(_LAST, count), strict=True)]


def facts(rng: random.Random, tokens: int, count: Count) -> Sample:
    """Five facts about five people in a novel, each asked for by itself; the name is what both have in common."""
    names, told, questions = people(rng, ASKED), [], []
    for name, (statement, asked, lead, values) in zip(names, rng.sample(KINDS, ASKED), strict=True):
        value = rng.choice(values)
        told.append(statement.format(name, value))
        questions.append(Question(asked.format(name), (value,), lead=lead.format(name), room=10))
    document = prose_with(rng, told, tokens, count, prose.passage(rng))
    return Sample(document, tuple(questions))
