"""Common and frequent words (RULER, arXiv 2404.06654): what a list or a coded text holds most often."""

import random
import string
from itertools import accumulate

from kvote.eval import prose
from kvote.eval.sample import Count, Question, Sample, most

_COMMON, _TIMES, _OTHER_TIMES = 10, 30, 3
# Exponent of the law by which the words of a coded text become rarer.
_ALPHA = 2.0
_VOCABULARY = 1_000


def common(rng: random.Random, tokens: int, count: Count) -> Sample:
    """Ten words come thirty times each, others three times each, in a numbered list."""
    chosen, wanted = rng.sample(prose.words(), k=len(prose.words())), _COMMON + max(10, tokens // 6)
    # Longer lists than there are words take some of two words.
    chosen += [f"{a}-{b}" for a, b in zip(*(rng.choices(chosen[_COMMON:], k=wanted) for _ in range(2)), strict=True)]
    chosen = list(dict.fromkeys(chosen))[:wanted]
    # Short documents hold fewer of both, in the same proportion.
    times = min(_TIMES, max(_OTHER_TIMES + 3, tokens // 120))
    best, others = chosen[:_COMMON], chosen[_COMMON:]

    def listed(number: int, seed: int) -> str:
        held = best * times + others[:number] * _OTHER_TIMES
        random.Random(seed).shuffle(held)
        return " ".join(f"{i + 1}. {word}" for i, word in enumerate(held))

    seed, low, high = rng.getrandbits(32), 1, len(others)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(listed(middle, seed)) <= tokens else (low, middle)
    question = Question(
        "What are the 10 most common words in the list above?",
        tuple(best),
        lead="The 10 words that appear most often in the list are: 1.",
        room=72,
    )
    document = f"A numbered list of words follows. Remember those that appear most often.\n\n{listed(low, seed)}"
    return Sample(document, (question,))


def frequent(rng: random.Random, tokens: int, count: Count) -> Sample:
    """A text of made-up words whose numbers fall by a power law; the most frequent of all is noise."""
    made = list(dict.fromkeys("".join(rng.choices(string.ascii_lowercase, k=6)) for _ in range(_VOCABULARY)))
    weights = list(accumulate(1 / (rank + 1) ** _ALPHA for rank in range(len(made))))
    drawn = rng.choices(["...", *made], cum_weights=[*weights, weights[-1] + 1 / (len(made) + 1) ** _ALPHA], k=tokens)
    text = drawn[: most(drawn, tokens, count)]
    best = sorted(set(text) - {"..."}, key=text.count, reverse=True)[:3]
    question = Question(
        "Leave out the dots. What are the three words that appear most often in the coded text?",
        tuple(best),
        lead="The three words that appear most often are:",
        room=32,
    )
    return Sample(f"Remember which words appear most often in this coded text.\n\n{' '.join(text)}", (question,))
