"""How long a plan will take, from what this model needs on this machine."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import kvote
from kvote.eval.folder import read_records
from kvote.eval.plan import Unit
from kvote.eval.subject import Subject
from kvote.eval.tasks.book import SCORED

_SHORT, _LONG, _STEPS = 256, 1024, 4
# Questions of a document and tokens of their answers, as the tasks in prose have them.
_ANSWER_STEPS = 48
_DEFAULT_STEPS = {"perplexity": SCORED}
# Where the document is read with each question: how many a sample has.
_QUESTIONS = 4
# Of the length asked for, the share that is written and the share that is read.
_WRITTEN = {"counting": (1.0, 0.0), "copying": (0.5, 0.5)}


@dataclass(frozen=True)
class Speed:
    """Seconds that dense attention takes: a prompt of n tokens a * n + b * n * n, a generated token ``step``."""

    a: float
    b: float
    step: float

    def seconds(self, task: str, length: int, *, question_first: bool = False) -> float:
        """Of one sample with one method."""
        written, read = _WRITTEN.get(task, (0.0, 1.0))
        steps = written * length or _DEFAULT_STEPS.get(task, _ANSWER_STEPS)
        length = int(read * length)
        times = _QUESTIONS if question_first and task not in (*_DEFAULT_STEPS, *_WRITTEN) else 1
        return times * (self.a * length + self.b * length * length) + steps * self.step


def speed_of(subject: Subject) -> Speed:
    """Times two short prompts and some steps."""
    with torch.no_grad():
        _prompt(subject, _SHORT)
        short, _ = _prompt(subject, _SHORT)
        long, cache = _prompt(subject, _LONG)
        begin = time.perf_counter()
        for _ in range(_STEPS):
            token = torch.full((1, 1), 7, device=subject.model.device)
            subject.model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        step = (time.perf_counter() - begin) / _STEPS
    b = max(0.0, (long / _LONG - short / _SHORT) / (_LONG - _SHORT))
    return Speed(max(0.0, long / _LONG - b * _LONG), b, step)


def _prompt(subject: Subject, tokens: int) -> tuple[float, kvote.Cache]:
    cache, ids = kvote.Cache(subject.model), torch.arange(tokens, device=subject.model.device)[None] % 97 + 5
    begin = time.perf_counter()
    subject.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - begin, cache


def estimate(todo: Sequence[tuple[Unit, tuple[str, ...]]], speed: Speed, folder: str | Path, workers: int) -> float:
    """Seconds for ``todo``: as long as the same method took here on average for the same task and length, where it has
    been measured, and as long as dense attention should take where not."""
    took: dict[tuple[str, int, str], list[float]] = {}
    for record in read_records(folder).values():
        took.setdefault((record["task"], record["length"], record["name"]), []).append(record["seconds"])
    whole = 0.0
    for unit, names in todo:
        for name in names:
            past = took.get((unit.task, unit.length, name))
            whole += (
                sum(past) / len(past)
                if past
                else speed.seconds(unit.task, unit.length, question_first=unit.question_first)
            )
    return whole / workers
