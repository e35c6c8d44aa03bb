"""Whether an answer is right."""

import re

from kvote.eval.metrics import METRICS, classified
from kvote.eval.sample import Question

_ITEM = re.compile(r"[\w-]+")


def score(answer: str, question: Question) -> float:
    """From 0 to 1: of the ``answers`` the share that comes in it ('all', as RULER counts), whether any does ('any'),
    whether it is the first and nothing else ('exact'), or the share that comes in its place before the first that does
    not ('run'). Letters' case does not matter there. Other scores are those of ``metrics.py``."""
    answer = answer.lstrip("\n").split("\n")[0] if question.one_line else answer
    if question.score == "classes":
        return max(classified(answer, wanted, question.classes) for wanted in question.answers)
    if question.score in METRICS:
        return max(METRICS[question.score](answer, wanted) for wanted in question.answers)
    said = answer.lower()
    if question.score == "exact":
        return float(said.strip() == question.answers[0].lower())
    if question.score == "run":
        pairs = enumerate(zip(_ITEM.findall(said), question.answers, strict=False))
        right = next((i for i, (one, wanted) in pairs if one != wanted.lower()), None)
        return (min(len(_ITEM.findall(said)), len(question.answers)) if right is None else right) / len(
            question.answers
        )
    found = [wanted.lower() in said for wanted in question.answers]
    return float(any(found)) if question.score == "any" else sum(found) / len(found)
