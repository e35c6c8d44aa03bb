"""Readers of prompts, which leave to another reader what generated tokens read."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kvote.needs import Cuts, Needs, ReaderOffers
from kvote.read.reader import Activity, Everything, Memory, Reader, ReaderDefaults, Reading, Token
from kvote.rope import Rope
from kvote.tokens import Span


@dataclass(frozen=True)
class InPrompts(ReaderDefaults):
    """Decides what the tokens of prompts read. ``steps`` decides for generated ones, for drafts of them, and for the
    last tokens of a prompt if it treats them one by one (its ``tail``)."""

    steps: Reader = field(default_factory=Everything, kw_only=True)

    @property
    @abstractmethod
    def own_needs(self) -> Needs:
        """What it needs for prompts."""

    @property
    @abstractmethod
    def own_cuts(self) -> Cuts:
        """Where a prompt may be cut without changing what it reads."""

    @abstractmethod
    def read_prompt(self, reading: Reading, count: int) -> Iterator[Span]:
        """What the first ``count`` query rows read."""

    @property
    def tail(self) -> int:
        return self.steps.tail

    @property
    def needs(self) -> Needs:
        return self.own_needs | self.steps.needs

    @property
    def offers(self) -> ReaderOffers:
        return replace(self.steps.offers, uneven_heads=False, apart=True, cuts=self.own_cuts & self.steps.offers.cuts)

    def check(self, layers: int) -> None:
        self.steps.check(layers)

    def new_memory(self) -> Memory | None:
        return self.steps.new_memory()

    def read(self, reading: Reading) -> Iterator[Span]:
        # Where a prompt ends nobody has told, drafts of generated tokens are not thought to stand behind it.
        drafts = reading.prompt_left is None or reading.prompt_left < 0
        tail_queries = reading.tail_queries if drafts else min(reading.tail_queries, self.tail)
        count = 0 if reading.decode else reading.count - min(tail_queries, reading.count)
        if count:
            yield from self.read_prompt(reading, count)
        if count < reading.count:
            rest = reading
            if count:
                queries = reading.queries.rows(count, reading.count)
                rest = replace(
                    reading, queries=queries, first=reading.first + count, tail_queries=reading.count - count
                )
            for span in self.steps.read(rest):
                yield replace(span, start=span.start + count, stop=span.stop + count)

    def step(
        self, token: Token, segment: Any, rope: Rope | None, memory: Memory | None, activity: Activity
    ) -> Tensor | None:
        """As that of ``steps``, if it has one."""
        if "step" not in vars(type(self.steps)):
            return None
        answer: Tensor | None = self.steps.step(token, segment, rope, memory, activity)  # type: ignore[attr-defined]
        return answer


def joined(one: Reader, other: Reader) -> Reader | None:
    """A reader of prompts and one of generated tokens as one reader; None if they are not one of each."""
    for prompts, steps in ((one, other), (other, one)):
        if (
            isinstance(prompts, InPrompts)
            and isinstance(prompts.steps, Everything)
            and not isinstance(steps, InPrompts)
        ):
            return replace(prompts, steps=steps)
    return None
