"""Long answers: what a method drops or encodes while generating is needed to go on."""

import random

from kvote.eval import prose
from kvote.eval.sample import Count, Question, Sample, most

_SHOWN = 3
_MARGIN = 8


def counting(rng: random.Random, tokens: int, count: Count) -> Sample:
    """Counting on from a number of three digits, for ``tokens`` tokens in all."""
    start = rng.randrange(100, 1000)
    numbers = [str(start + i) for i in range(tokens)]
    document = "The numbers are counted in full, one after the other, with commas between them and nothing left out."
    asked = f"Count on from {start} without an end. Write every number in digits, and nothing else."
    lead = ", ".join(numbers[:_SHOWN]) + ","
    room = tokens - count(f"{document} {asked} {lead}")
    held = most(numbers[_SHOWN:], room - _MARGIN, count, ", ")
    wanted = tuple(numbers[_SHOWN : _SHOWN + held])
    return Sample(document, (Question(asked, wanted, "run", lead, room),))


def copying(rng: random.Random, tokens: int, count: Count) -> Sample:
    """A list of words that fills half of ``tokens``, to be written down again in the other half."""
    words, half = prose.words(), tokens // 2
    intro = "A list of words follows, to be copied in full and in this order."
    asked = "Copy the whole list from its first word to its last, with commas between the words, and nothing else."
    lead = "The list is:"
    drawn = rng.choices(words, k=max(8, half))
    held = most(drawn, half - count(f"{intro} {asked} {lead}"), count, ", ")
    listed = drawn[:held]
    room = count(", ".join(listed)) + _MARGIN
    return Sample(f"{intro}\n\n{', '.join(listed)}", (Question(asked, tuple(listed), "run", lead, room),))
