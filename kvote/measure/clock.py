"""Times of calls. What is compared alternates, so that a machine that others use too is as slow for one as for all."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any


def nothing() -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Call:
    """A function to be timed, and one that undoes it afterwards, untimed."""

    run: Callable[[], Any]
    undo: Callable[[], Any] = nothing


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median of its rounds, the shortest and the longest."""

    seconds: float
    shortest: float
    longest: float

    @classmethod
    def of(cls, rounds: list[float]) -> "Timing":
        return cls(median(rounds), min(rounds), max(rounds))


def once(run: Callable[[], Any], before: Callable[[], Any] = nothing) -> float:
    """Seconds of one call, behind ``before``."""
    before()
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def timed(call: Call, *, seconds: float = 0.3, most: int = 200, before: Callable[[], Any] = nothing) -> float:
    """Seconds of one call, the median of as many as fit into ``seconds``; ``before`` runs before each."""
    times: list[float] = []
    while not times or (sum(times) < seconds and len(times) < most):
        times.append(once(call.run, before))
        call.undo()
    return median(times)


def alternating(
    calls: Mapping[str, Call],
    rounds: int,
    *,
    seconds: float = 0.3,
    most: int = 200,
    before: Callable[[], Any] = nothing,
) -> dict[str, Timing]:
    """Every call in turn, ``rounds`` times; arguments as ``timed``."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call, seconds=seconds, most=most, before=before))
    return {name: Timing.of(spent) for name, spent in times.items()}
