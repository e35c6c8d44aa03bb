"""How published benchmarks score an answer: F1 of words, ROUGE-L, classes, numbers, code, letters."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_BARE = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
# A letter that stands by itself, as models answer a choice.
_LETTER = re.compile(r"\b([A-D])\b")
_COMMENT = ("`", "#", "//")


def f1(said: str, wanted: str) -> float:
    """Of the words that both have, without articles and punctuation: SQuAD's, as LongBench and InfiniteBench use it."""
    return _f1(bare(said).split(), bare(wanted).split())


def f1_of_characters(said: str, wanted: str) -> float:
    """The same by characters, for Chinese."""
    return _f1(_characters(said), _characters(wanted))


def rouge(said: str, wanted: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words, of the whole text at once."""
    one, other = bare(said).split(), bare(wanted).split()
    if not one or not other:
        return 0.0
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for i, wants in enumerate(other, 1):
            before, row[i] = row[i], before + 1 if word == wants else max(row[i], row[i - 1])
    common = row[-1]
    return 2 * common / (len(one) + len(other))


def numbers(said: str, wanted: str) -> float:
    """Of the numbers that are said, the share that is the one in ``wanted``."""
    found, right = re.findall(r"\d+", said), re.search(r"\d+", wanted)
    return found.count(right[0]) / len(found) if found and right else 0.0


def first_number(said: str, wanted: str) -> float:
    """Whether the first number is the right one."""
    found = _NUMBER.search(said)
    return float(found is not None and float(found[0]) == float(wanted))


def last_number(said: str, wanted: str) -> float:
    """Whether the last word is the right whole number, which may be negative."""
    words = re.sub(r"[.`'\":\n]", " ", said).split()
    return float(bool(words) and words[-1] == wanted)


def code(said: str, wanted: str) -> float:
    """How much alike are the first line that is no comment, and the right one."""
    line = next((line for line in said.lstrip("\n").split("\n") if not any(sign in line for sign in _COMMENT)), "")
    return SequenceMatcher(None, line, wanted, autojunk=False).ratio()


def letter(said: str, wanted: str) -> float:
    """Whether the first letter from A to D that stands alone is the right one."""
    found = _LETTER.search(said)
    return float(found is not None and found[1] == wanted)


def classified(said: str, wanted: str, classes: Sequence[str]) -> float:
    """1 over the number of ``classes`` that are named, if the right one is among them; a class that is part of the
    right one's name does not count."""
    named = [one for one in classes if one in said and not (one in wanted and one != wanted)]
    return 1 / len(named) if wanted in named else 0.0


def bare(text: str) -> str:
    """Lower case, without punctuation and articles."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_BARE)).split())


def _characters(text: str) -> list[str]:
    return [one for one in text.lower() if not one.isspace() and unicodedata.category(one)[0] not in "PS"]


def _f1(said: list[str], wanted: list[str]) -> float:
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


# Of several right answers, the one that is met best counts.
METRICS: dict[str, Callable[[str, str], float]] = {
    "f1": f1,
    "f1_of_characters": f1_of_characters,
    "rouge": rouge,
    "numbers": numbers,
    "first_number": first_number,
    "last_number": last_number,
    "code": code,
    "letter": letter,
}
