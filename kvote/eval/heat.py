"""Heat: which tokens of a text the heads of a model vote for while it answers, for people to look at."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvote.errors import InputError, KvoteError
from kvote.eval.folder import Record
from kvote.eval.plan import Plan, Unit, make
from kvote.eval.read import Reading
from kvote.eval.subject import Subject
from kvote.files import named, write_whole
from kvote.method import Method
from kvote.needs import Needs
from kvote.read.head_votes import HeadVotes
from kvote.read.reader import Reading as Step
from kvote.read.reader import everything
from kvote.spec import parse
from kvote.tokens import Span

VOTES = "votes.json"
# Texts that are looked at, the first of as many tasks, and tokens that are too many to look at.
_TEXTS, _MOST = 3, 32_768


@dataclass
class Noted:
    """``votes`` [n] on the tokens of a text, added up over ``queries``, those of each layer by themselves."""

    votes: Tensor = field(default_factory=lambda: torch.zeros(0))
    queries: int = 0

    def __deepcopy__(self, memo: Any) -> "Noted":
        # Questions are asked of copies of a cache, and all of them write here.
        return self

    def add(self, votes: Tensor, start: int) -> None:
        """``votes`` [n] on the tokens from ``start`` on, of one query."""
        size = start + len(votes)
        if len(self.votes) < size:
            self.votes = torch.cat([self.votes, torch.zeros(size - len(self.votes))])
        self.votes[start:size] += votes.float().cpu()
        self.queries += 1


@dataclass(frozen=True)
class Watched(HeadVotes):
    """Votes as TokenSelect does and notes it, of the last query of every pass, but reads everything."""

    noted: Noted = field(default_factory=Noted)

    @property
    def needs(self) -> Needs:
        return Needs(keys=super().needs.keys)

    def step(self, *given: Any) -> None:
        """A shorter way would vote unseen."""
        return

    def read(self, reading: Step) -> Iterator[Span]:
        row = reading.count - 1
        edge = self._edge(reading, row, reading.count)
        if edge > self.sinks:
            query = self._scoring_queries(reading, row, reading.count)
            self.noted.add(self._votes(reading, query, [edge])[0, 0], self.sinks)
        yield everything(reading)


def watching(spec: str) -> tuple[Method, Noted]:
    """A method that reads everything and notes what the heads vote for by the rules of ``spec``, a TokenSelect."""
    reader = parse(spec).read
    if not isinstance(reader, HeadVotes):
        raise InputError(f"Votes are those of tokenselect; {spec} casts none.")
    given = {one.name: getattr(reader, one.name) for one in fields(HeadVotes)}
    watched = Watched(**given | {"theta": 2.0, "sketch": "none", "positions": "original"})
    return Method(read=watched), watched.noted


def spec_of(plan: Plan) -> str:
    """The first TokenSelect that is measured, or the default one."""
    return next((spec for spec in plan.methods if spec.startswith("tokenselect") and "|" not in spec), "tokenselect")


def heat_of(subject: Subject, plan: Plan, unit: Unit) -> Record | None:
    """Votes on the document of ``unit`` while its first question is answered; None if it has none."""
    sample = make(unit, plan.seed, subject.count)
    if not sample.questions:
        return None
    spec = spec_of(plan)
    method, noted = watching(spec)
    reading = Reading(subject, method, sample.document)
    noted.votes, noted.queries = torch.zeros(0), 0
    question = sample.questions[0]
    reading.ask(replace(question, room=min(question.room, 32)))
    pieces = _pieces(subject, subject.template.opening(sample.document), reading.ids[0].tolist())
    votes = torch.zeros(len(pieces))
    count = min(len(pieces), len(noted.votes))
    votes[:count] = noted.votes[:count] / max(1, noted.queries)
    return {
        "task": unit.task,
        "length": unit.length,
        "index": unit.index,
        "method": spec,
        "question": question.text,
        "expected": list(question.answers),
        "pieces": pieces,
        "votes": [round(vote, 5) for vote in votes.tolist()],
    }


def _pieces(subject: Subject, text: str, ids: Sequence[int]) -> list[str]:
    """The text of each token."""
    if getattr(subject.tokenizer, "is_fast", False):
        special = not subject.template.chat
        found = subject.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        if found.input_ids[: len(ids)] == list(ids):
            pieces, done = [], 0
            for _, end in found.offset_mapping[: len(ids)]:
                pieces.append(text[done : max(done, end)])
                done = max(done, end)
            return pieces
    return [subject.tokenizer.decode([one]) for one in ids]


def write_heat(subject: Subject, plan: Plan, folder: str | Path) -> str | None:
    """Adds what is missing to the votes in ``folder``: of the first sample, at the smallest length, of the first tasks
    that ask. Returns why there are none, if the model or the plan allows none."""
    held = {one["task"]: one for one in read_heat(folder)}
    for task in plan.tasks:
        if len(held) >= _TEXTS:
            break
        if task in held or min(plan.lengths) > _MOST:
            continue
        try:
            found = heat_of(subject, plan, Unit(task, min(plan.lengths), 0, ()))
        except (KvoteError, NotImplementedError) as error:
            return str(error)
        if found is not None:
            held[task] = found
    write_whole(Path(folder) / VOTES, json.dumps(list(held.values())))
    return None


def read_heat(folder: str | Path) -> list[Record]:
    """What was noted in ``folder``, nothing if there is no file. Raises InputError for what is none of kvote's."""
    file = Path(folder) / VOTES
    try:
        held = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        if not all(len(one["pieces"]) == len(one["votes"]) for one in held):
            raise ValueError("a text has other numbers of pieces and votes")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"Cannot read {named(file)}: {error}.") from error
    return held
