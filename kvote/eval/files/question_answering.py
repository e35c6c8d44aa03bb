"""RULER's two tasks that need a data set (arXiv 2404.06654): questions of SQuAD and of HotpotQA, each over the
paragraphs that answer it and as many others as the length has room for."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvote.errors import InputError
from kvote.eval.files.lines import Assembled, Record, parsed, records
from kvote.eval.sample import Count, Question, Sample, most
from kvote.files import named

_INTRO = "Documents follow.\n\n"


@dataclass(frozen=True)
class Asked:
    """A question, its answers, and which paragraphs of the file it is about."""

    text: str
    answers: tuple[str, ...]
    about: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """Questions of a file and all its paragraphs."""

    asked: tuple[Asked, ...]
    paragraphs: tuple[str, ...]

    def make(self, rng: random.Random, tokens: int, count: Count) -> Sample:
        """One question over its paragraphs and others, in random order and numbered."""
        one = rng.choice(self.asked)
        others = [paragraph for paragraph in self.paragraphs if paragraph not in one.about]
        rng.shuffle(others)
        room = tokens - count(_INTRO + _listed(one.about))
        if room < 0:
            raise InputError(f"A document of {tokens:,} tokens has no room for the paragraphs of this question.")
        # Every number in front of a paragraph takes tokens too.
        sized = [f"Document {i + 100}:\n{paragraph}" for i, paragraph in enumerate(others)]
        held = [*one.about, *others[: most(sized, room, count, "\n\n") if sized and count(sized[0]) <= room else 0]]
        rng.shuffle(held)
        asked = f"Answer the question from the documents, in as few words as possible. Question: {one.text}"
        return Sample(_INTRO + _listed(held), (Question(asked, one.answers, "any", "Answer:", 32),))


def squad(path: Path, data: bytes) -> Assembled:
    """A file of SQuAD, version 1 or 2; questions without an answer are left out. Raises InputError."""
    held = parsed(path, data)
    asked: list[Asked] = []
    paragraphs: list[str] = []
    for article in _list(held, "data", named(path)):
        for paragraph in _list(article, "paragraphs", named(path)):
            text = Record(paragraph, f"A paragraph of {named(path)}").text("context")
            paragraphs.append(text)
            for one in _list(paragraph, "qas", named(path)):
                question = Record(one, f"A question of {named(path)}")
                if one.get("is_impossible"):
                    continue
                given = [Record(each, question.where).text("text") for each in _list(one, "answers", question.where)]
                asked.append(Asked(question.text("question"), tuple(given), (text,)))
    return _corpus(path, asked, paragraphs)


def hotpotqa(path: Path, data: bytes) -> Assembled:
    """A file of HotpotQA with its distractors. Raises InputError."""
    asked: list[Asked] = []
    paragraphs: list[str] = []
    for record in records(path, data):
        told: dict[str, str] = {}
        context = record.held.get("context")
        for one in context if isinstance(context, list) and context else [None]:
            if not (isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) and isinstance(one[1], list)):
                raise record.wrong("has no titles with sentences under 'context'")
            told[one[0]] = f"{one[0]}\n{''.join(map(str, one[1]))}"
        facts = record.held.get("supporting_facts")
        titles = [one[0] for one in facts if isinstance(one, list) and one] if isinstance(facts, list) else []
        about = tuple(told[title] for title in dict.fromkeys(titles) if title in told)
        # Test files name no supporting facts: then all that a question comes with is kept.
        asked.append(Asked(record.text("question"), (record.text("answer"),), about or tuple(told.values())))
        paragraphs += told.values()
    return _corpus(path, asked, paragraphs)


def _corpus(path: Path, asked: Sequence[Asked], paragraphs: Sequence[str]) -> Assembled:
    fine = tuple(one for one in asked if one.answers)
    if not fine:
        raise InputError(f"{named(path)} holds no question with an answer.")
    return Assembled(Corpus(fine, tuple(dict.fromkeys(paragraphs))).make)


def _list(held: Any, key: str, where: str) -> list[Any]:
    found = held.get(key) if isinstance(held, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise InputError(f"{where} has no list of objects under {key!r}.")
    return found


def _listed(paragraphs: Sequence[str]) -> str:
    return "\n\n".join(f"Document {i}:\n{paragraph}" for i, paragraph in enumerate(paragraphs, 1))
