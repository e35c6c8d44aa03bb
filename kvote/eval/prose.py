"""The bundled novel, as sentences and as words. Its source is named in ``data/README.md``."""

import hashlib
import random
import re
from functools import cache
from importlib.resources import files

_FRONT_MATTER = "CHAPTER 1"
_SENTENCE_END = re.compile(r'(?<=[.!?]["”])\s+|(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)\s+')
_WORD = re.compile(r"\b[a-z]{5,9}\b")
# A word of a key must be none that the text is full of, and none that only one passage has.
_COMMON, _RARE = 60, 2


@cache
def text() -> str:
    """The novel from its first chapter on, one line per paragraph."""
    raw = (files("kvote.eval") / "data" / "northangerabbey.txt").read_text(encoding="utf-8")
    body = raw[raw.index(_FRONT_MATTER) :]
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", body))
    return "\n".join(part for part in paragraphs if part and not part.startswith("CHAPTER"))


@cache
def sentences() -> tuple[str, ...]:
    """Its sentences, in order."""
    return tuple(part for line in text().split("\n") for part in _SENTENCE_END.split(line) if part)


@cache
def words() -> tuple[str, ...]:
    """Words of five to nine letters that are neither rare nor common in it, sorted."""
    found: dict[str, int] = {}
    for word in _WORD.findall(text()):
        found[word] = found.get(word, 0) + 1
    return tuple(sorted(word for word, count in found.items() if _RARE <= count <= _COMMON))


def passage(rng: random.Random) -> list[str]:
    """All sentences, beginning at a random one and going round."""
    whole = sentences()
    start = rng.randrange(len(whole))
    return [*whole[start:], *whole[:start]]


@cache
def digest() -> str:
    """SHA-256 of the text that tasks are made of."""
    return hashlib.sha256(text().encode()).hexdigest()
