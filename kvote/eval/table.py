"""Records of a run, gathered by task, length and method: what the report shows."""

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from kvote.eval.folder import Record
from kvote.eval.intervals import Interval, difference, interval

DENSE = "dense"


@dataclass(frozen=True)
class Tail:
    """KL(dense | method) over all tokens, in nats."""

    median: float
    p99: float
    largest: float


@dataclass(frozen=True)
class Row:
    """One method on one task and length. ``value``: share of right answers, or nats per token of a likelihood.
    ``beside``: the difference to dense attention on the same samples; ``diverges``: the median first token that
    differs from dense attention's, None where none does; ``refused``: why there are no values."""

    task: str
    length: int
    name: str
    value: Interval | None
    beside: Interval | None
    nbytes: float
    tokens_read: float
    ms_per_token: float
    tail: Tail | None
    diverges: float | None
    refused: str | None

    @property
    def mib(self) -> float:
        return self.nbytes / 2**20


def is_likelihood(task: str) -> bool:
    """Whether its values are nats per token, of which fewer are better."""
    return task == "perplexity"


def rows_of(records: Iterable[Record]) -> list[Row]:
    """A row for each method on each task and length, in the order in which they were measured."""
    groups: dict[tuple[str, int, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["task"], record["length"], record["name"]), []).append(record)
    return [_row(*key, held, groups.get((key[0], key[1], DENSE), [])) for key, held in groups.items()]


def _row(task: str, length: int, name: str, held: list[Record], dense: list[Record]) -> Row:
    fine = [record for record in held if "refused" not in record]
    refused = next((record["refused"] for record in held if "refused" in record), None)
    values, base = _values(fine), _values(record for record in dense if "refused" not in record)
    kl = [value for record in fine for value in record.get("kl", ())]
    return Row(
        task,
        length,
        name,
        interval(list(values.values())) if values else None,
        difference(values, base) if name != DENSE else None,
        _mean(fine, "nbytes"),
        _mean(fine, "tokens_read"),
        _mean(fine, "ms_per_token"),
        Tail(float(np.median(kl)), float(np.percentile(kl, 99)), max(kl)) if kl and name != DENSE else None,
        None if name == DENSE else _divergence(fine, dense),
        refused,
    )


def by_question(records: Iterable[Record], task: str) -> dict[tuple[int, str], list[float]]:
    """Mean score of each question of a ``task``, by length and method."""
    held: dict[tuple[int, str], list[list[float]]] = {}
    for record in records:
        if record["task"] == task and "scores" in record:
            held.setdefault((record["length"], record["name"]), []).append(record["scores"])
    return {key: [fmean(column) for column in zip(*rows, strict=False)] for key, rows in sorted(held.items())}


def _values(records: Iterable[Record]) -> dict[str, float]:
    return {str(record["index"]): record["score"] if "score" in record else fmean(record["nll"]) for record in records}


def _mean(records: list[Record], name: str) -> float:
    values = [record[name] for record in records if record.get(name) is not None]
    return fmean(values) if values else float("nan")


def _divergence(fine: list[Record], dense: list[Record]) -> float | None:
    base = {record["index"]: record for record in dense}
    found: list[int] = []
    for record in fine:
        if record.get("first_divergence") is not None:
            found.append(record["first_divergence"])
        theirs: Any = base.get(record["index"], {}).get("answer_ids", ())
        for mine, other in zip(record.get("answer_ids", ()), theirs, strict=False):
            if mine != other:
                pairs = zip(mine, other, strict=False)
                found.append(next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(mine), len(other))))
    return float(np.median(found)) if found else None
