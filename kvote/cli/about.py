"""The docstring of a method, split into its parameters and the rest."""

import inspect
import re
from dataclasses import dataclass
from typing import Any

from kvote.method import METHODS, Published

_LIKE = re.compile(r"Parameters as in ``(\w+)``")
_SENTENCE = re.compile(r"(?<=\.)\s+(?=[A-Z`])")


@dataclass(frozen=True)
class Parameter:
    """``meaning`` is empty where the docstring does not mention it; ``default`` is as one would write it."""

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class About:
    """The parameters, and the paragraphs that are about none of them; those with a line break are tables."""

    parameters: list[Parameter]
    paragraphs: list[str]


def about(published: Published) -> About:
    """``published``, from its signature and docstring."""
    signature = inspect.signature(published.build).parameters
    paragraphs = (inspect.getdoc(published.build) or "").split("\n\n")[1:]
    meanings: dict[str, str] = {}
    rest = []
    for paragraph in paragraphs:
        left = paragraph if "===" in paragraph else _taken_out(" ".join(paragraph.split()), list(signature), meanings)
        if left:
            rest.append(left)
    likened = _LIKE.search(" ".join(rest))
    others = about(METHODS[likened[1]]).parameters if likened and likened[1] in METHODS else []
    meant = {**{other.name: other.meaning for other in others}, **_mentioned(rest, list(signature), meanings)}
    parameters = [
        Parameter(name, _default(parameter), _plain(meant.get(name, ""))) for name, parameter in signature.items()
    ]
    return About(parameters, [_plain(paragraph) for paragraph in rest])


def _taken_out(paragraph: str, names: list[str], meanings: dict[str, str]) -> str:
    """A paragraph without its ``name``: ... parts, which go into ``meanings``."""
    starts = [
        found
        for found in re.finditer(r"(?:^|(?<=[.;] ))``(\w+)``: ", paragraph)
        if found[1] in names and found[1] not in meanings
    ]
    ends = [*(found.start() for found in starts[1:]), len(paragraph)]
    for found, end in zip(starts, ends, strict=False):
        meanings[found[1]] = paragraph[found.end() : end].strip()
    return paragraph[: starts[0].start()].strip() if starts else paragraph


def _mentioned(paragraphs: list[str], names: list[str], meanings: dict[str, str]) -> dict[str, str]:
    """``meanings``, and for every other name the first sentence that mentions it, or where that stands."""
    sentences = [sentence for paragraph in paragraphs for sentence in _SENTENCE.split(paragraph)]
    found = dict(meanings)
    for name in [name for name in names if name not in meanings]:
        sentence = next((each for each in sentences if f"``{name}``" in each), None)
        told = next((other for other, text in found.items() if text == sentence or f"``{name}``" in text), None)
        if told is not None or sentence is not None:
            found[name] = f"see {told}." if told is not None else str(sentence)
    return found


def _default(parameter: inspect.Parameter) -> str:
    value: Any = parameter.default
    return "needed" if value is inspect.Parameter.empty else repr(value)


def _plain(text: str) -> str:
    return text.replace("``", "")
