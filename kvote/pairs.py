"""Which methods compose with which, found out by building every pair."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, get_args

import kvote.methods  # noqa: F401  (each method registers itself)
from kvote.calibration.example import examples
from kvote.calibration.file import Calibration
from kvote.errors import KvoteError
from kvote.method import METHODS, Method, Published


@dataclass(frozen=True)
class Pair:
    """Two methods, and what joins them: ``given`` parameters such as "per_head=False", none if their defaults do; or
    the ``reason`` why nothing does."""

    left: str
    right: str
    given: tuple[str, ...] = ()
    reason: str | None = None


def pairs() -> list[Pair]:
    """All pairs of two different methods, in the order of their names."""
    ways = {name: list(_ways(METHODS[name])) for name in sorted(METHODS)}
    return [_pair(a, b, ways) for a, b in combinations(ways, 2)]


def _pair(left: str, right: str, ways: dict[str, list[tuple[tuple[str, ...], Method]]]) -> Pair:
    """With as few parameters changed as possible; the reason is that of the defaults."""
    reason = None
    tries = sorted(product(ways[left], ways[right]), key=lambda both: sum(len(given) for given, _ in both))
    for (one, a), (other, b) in tries:
        try:
            _ = a | b
        except KvoteError as error:
            reason = reason or _why(str(error), a, b)
            continue
        return Pair(left, right, (*one, *(given for given in other if given not in one)))
    return Pair(left, right, reason=reason)


def _why(message: str, a: Method, b: Method) -> str:
    """The reason without the names of the pair."""
    message = message.removeprefix(f"{a.spec} | {b.spec}: ").replace(f"{a.spec} and {b.spec} both", "both")
    return message.split("; compose methods")[0].rstrip(".")


def _ways(published: Published) -> Iterator[tuple[tuple[str, ...], Method]]:
    """The method with its defaults, and with each choice of yes or no turned round, two at most. Where it needs a
    calibration, with an example of one."""
    signature = inspect.signature(published.build).parameters
    needed = [name for name, parameter in signature.items() if Calibration in get_args(parameter.annotation)]
    flipped = {name: not p.default for name, p in signature.items() if isinstance(p.default, bool)}
    changes: list[dict[str, Any]] = [{}, *({name: value} for name, value in flipped.items())]
    changes += [{a: flipped[a], b: flipped[b]} for a, b in combinations(flipped, 2)]
    for change in changes:
        method = _built(published, needed, change)
        if method is not None:
            yield tuple(f"{name}={value}" for name, value in change.items()), method


def _built(published: Published, needed: list[str], given: dict[str, Any]) -> Method | None:
    """The method, with whichever calibration it takes if it needs one; None if it does not like what is given."""
    calibrations = [None, *examples()] if needed else [None]
    tried = (_attempt(published, {**given, **dict.fromkeys(needed, held)}) for held in calibrations)
    return next((method for method in tried if method is not None), None)


def _attempt(published: Published, given: dict[str, Any]) -> Method | None:
    try:
        return published.build(**given)
    except KvoteError:
        return None
