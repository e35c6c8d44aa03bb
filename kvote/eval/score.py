"""Whether an answer is right."""

from kvote.eval.sample import Question


def score(answer: str, question: Question) -> float:
    """From 0 to 1: of the ``answers`` the share that comes in it ('all', as RULER counts), whether any does ('any'), or
    whether it is the first and nothing else ('exact'). Letters' case does not matter."""
    said = answer.lower()
    if question.score == "exact":
        return float(said.strip() == question.answers[0].lower())
    found = [wanted.lower() in said for wanted in question.answers]
    return float(any(found)) if question.score == "any" else sum(found) / len(found)
