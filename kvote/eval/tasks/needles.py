"""Needles in a haystack: the eight variants of RULER (Hsieh et al. 2024, arXiv 2404.06654), and the passkey."""

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from kvote.eval import prose
from kvote.eval.sample import Count, Question, Sample, most, prose_with

_NOISE = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
# Sentences of noise or of distractors that are made ready, far more than any length holds.
_MANY = 200_000
_ASKED_OF_MANY = 4


@dataclass(frozen=True)
class Needles:
    """One variant. ``hay``: 'noise', 'prose' or 'needles'; ``keys`` in the text, of which ``asked`` are asked for, with
    ``values`` each. ``apart``: each key is asked for in a question of its own."""

    hay: str
    key: str = "words"
    value: str = "number"
    keys: int = 1
    asked: int = 1
    values: int = 1
    apart: bool = False

    def make(self, rng: random.Random, tokens: int, count: Count) -> Sample:
        kind = {"number": "number", "uuid": "code"}[self.value]
        told: dict[str, list[str]] = {}
        while len(told) < self.keys:
            told[_drawn(rng, self.key)] = [_drawn(rng, self.value) for _ in range(self.values)]
        needles = [_told(key, value, kind) for key, held in told.items() for value in held]
        document = self._document(rng, needles, tokens, count, kind)
        asked = list(told)[: self.asked]
        groups = [[key] for key in asked] if self.apart else [asked]
        room = (16 if self.value == "number" else 48) * max(1, self.values) * (1 if self.apart else len(asked))
        questions = tuple(
            Question(
                _asked(group, kind, self.values),
                tuple(value for key in group for value in told[key]),
                lead=_lead(group, kind, self.values),
                room=room,
            )
            for group in groups
        )
        return Sample(f"Some special {kind}s are hidden in the following text. Remember them.\n\n{document}", questions)

    def _document(self, rng: random.Random, needles: list[str], tokens: int, count: Count, kind: str) -> str:
        if self.hay == "prose":
            return prose_with(rng, needles, tokens, count, prose.passage(rng))
        if self.hay == "noise":
            noise = [_NOISE[i % len(_NOISE)] for i in range(min(_MANY, 2 * tokens))]
            return prose_with(rng, needles, tokens, count, noise)
        others = [_told(_drawn(rng, self.key), _drawn(rng, self.value), kind) for _ in range(max(8, tokens // 8))]
        return "\n".join(_mixed(rng, needles, others[: most(others, tokens - count(" ".join(needles)), count, "\n")]))


def _mixed(rng: random.Random, needles: list[str], others: list[str]) -> list[str]:
    out = [*needles, *others]
    rng.shuffle(out)
    return out


def _drawn(rng: random.Random, kind: str) -> str:
    if kind == "number":
        return str(rng.randrange(10**6, 10**7))
    if kind == "uuid":
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(prose.words())}-{rng.choice(prose.words())}"


def _told(key: str, value: str, kind: str) -> str:
    return f"One of the special magic {kind}s for {key} is: {value}."


def _asked(keys: list[str], kind: str, values: int) -> str:
    if len(keys) == 1 and values == 1:
        return f"What is the special magic {kind} for {keys[0]} mentioned in the text?"
    named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    return f"What are all the special magic {kind}s for {named} mentioned in the text?"


def _lead(keys: list[str], kind: str, values: int) -> str:
    if len(keys) == 1 and values == 1:
        return f"The special magic {kind} for {keys[0]} mentioned in the text is"
    named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    return f"The special magic {kind}s for {named} mentioned in the text are"


def passkey(rng: random.Random, tokens: int, count: Count) -> Sample:
    """A number of five digits in noise that repeats (Mohtashami & Jaggi 2023, arXiv 2305.16300)."""
    number = str(rng.randrange(10**4, 10**5))
    noise = [_NOISE[i % len(_NOISE)] for i in range(min(_MANY, 2 * tokens))]
    needle = f"The pass key is {number}. Remember it. {number} is the pass key."
    document = prose_with(rng, [needle], tokens, count, noise)
    asked = Question("What is the pass key?", (number,), lead="The pass key is", room=12)
    return Sample(f"A pass key is hidden in much irrelevant text. Remember it.\n\n{document}", (asked,))


NEEDLES: dict[str, Callable[[random.Random, int, Count], Sample]] = {
    "niah_single_1": Needles("noise").make,
    "niah_single_2": Needles("prose").make,
    "niah_single_3": Needles("prose", value="uuid").make,
    # RULER asks for one of the four keys; here each is asked for, of a document that is read once.
    "niah_multikey_1": Needles("prose", keys=_ASKED_OF_MANY, asked=_ASKED_OF_MANY, apart=True).make,
    "niah_multikey_2": Needles("needles").make,
    "niah_multikey_3": Needles("needles", key="uuid", value="uuid").make,
    "niah_multivalue": Needles("prose", values=4).make,
    "niah_multiquery": Needles("prose", keys=4, asked=4).make,
    "passkey": passkey,
}
