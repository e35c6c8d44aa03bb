"""Perplexity of a book behind N tokens of it."""

import random

from kvote.errors import InputError
from kvote.eval import prose
from kvote.eval.sample import Count, Sample, most

# Tokens that are scored, one by one: as many as characters of English prose suffice for.
SCORED = 128
# Places in the book that are measured at least: how well it goes on differs more between them than between methods.
POSITIONS = 5
_CHARACTERS = 8 * SCORED


def perplexity(rng: random.Random, tokens: int, count: Count) -> Sample:
    """A passage of the novel that begins at a random sentence, and what follows it."""
    whole = prose.sentences()
    # Room for the passage and what follows, in sentences of some 25 tokens; the novel's end is not joined to its start.
    held = most(whole, tokens, count) if count(" ".join(whole)) > tokens else len(whole)
    last = len(whole) - int(1.3 * held) - SCORED
    if last < 0:
        raise InputError(f"The bundled novel is too short for a perplexity behind {tokens:,} tokens; give fewer.")
    start = rng.randint(0, last)
    parts = whole[start:]
    stop = most(parts, tokens, count)
    return Sample(" ".join(parts[:stop]), continuation=" " + " ".join(parts[stop:])[:_CHARACTERS])
