"""Facts in the small language of the embedded model, which reads no English."""

import random

from kvote.errors import InputError
from kvote.eval.sample import Count, Question, Sample
from kvote.models import world as language

_FACTS = 4
_LEAST = 128


def world(rng: random.Random, tokens: int, count: Count) -> Sample:
    """Four facts of the built-in language and a question about each; an answer is right if it is all that is said."""
    return _made("needle", rng, tokens, _FACTS, turns=False)


def world_turns(rng: random.Random, tokens: int, count: Count) -> Sample:
    """A question of the built-in language, and one that goes on from its answer."""
    return _made("turns", rng, tokens, 2, turns=True)


def _made(task: str, rng: random.Random, tokens: int, asked: int, *, turns: bool) -> Sample:
    if tokens < _LEAST:
        raise InputError(f"A document of {tokens:,} tokens has no room for this task; give at least {_LEAST}.")
    made = language.sample(task, tokens, rng.getrandbits(32), _FACTS, asked)
    questions = tuple(Question(one.prompt, (one.answer,), score="exact", room=8) for one in made.questions)
    return Sample(made.document, questions, turns=turns)
