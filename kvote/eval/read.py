"""One document in one kvote cache, asked question by question, or scored token by token."""

import copy
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

import kvote
from kvote.answering import mark_next
from kvote.errors import NotFiniteError
from kvote.eval.sample import Question
from kvote.eval.subject import Subject
from kvote.method import Method

TOKENS_PER_PASS = 4096


@dataclass
class Answered:
    """What came behind a question: tokens, and milliseconds for each (median)."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


class Reading:
    """A cache that has read a document. Every question sees the document alone, unless it is a turn of a talk.

    ``question_first``: the document is not read now, but anew with each question, as one prompt; in a talk, with the
    first. ``last`` is the cache that answered last; ``nbytes`` is what was held once the document (and a question in
    its prompt) was read, ``seconds`` how long that took the last time.
    """

    def __init__(self, subject: Subject, method: str | Method, document: str, *, question_first: bool = False) -> None:
        self.subject, self.question_first = subject, question_first
        self.cache = kvote.Cache(subject.model, method)
        self.ids = subject.ids(subject.template.opening(document), first=True)
        self.seconds, self.nbytes, self.last = 0.0, 0, self.cache
        if not question_first:
            self.logits = self._prompt(self.ids)
        # The last token of an answer that filled its room: the cache has not read it.
        self._unread: list[int] = []

    def _prompt(self, *parts: Tensor) -> Tensor:
        """Logits [n] behind the document and, where there is a second part, the question. Raises NotFiniteError."""
        begin = time.perf_counter()
        self.cache.expect(sum(part.shape[1] for part in parts), question_follows=len(parts) == 1)
        for part, name in zip(parts, ("document", "question"), strict=False):
            mark_next(self.cache, name, self.cache.get_seq_length() + part.shape[1])
            logits = self._feed(self.cache, part)
        # Methods that ask for it.
        kvote.read_again(self.subject.model, self.cache, torch.cat(parts, dim=1), tokenizer=self.subject.tokenizer)
        self.seconds, self.nbytes = time.perf_counter() - begin, self.cache.nbytes()
        return logits

    @torch.no_grad()
    def _feed(self, cache: kvote.Cache, ids: Tensor) -> Tensor:
        """Logits [n] behind ``ids`` [1, t]. Raises NotFiniteError."""
        for part in torch.split(ids, TOKENS_PER_PASS, dim=1):
            output = self.subject.model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[0, -1].float()
        if not bool(logits.amax().isfinite()):
            raise NotFiniteError(f"{self.subject.name} gave NaN or infinite logits with {cache.method.spec}.")
        return logits

    def ask(self, question: Question) -> Answered:
        """Answers greedily from the document, and leaves the cache as it was, or reads both as one prompt."""
        asked = self.subject.ids(self.subject.template.asking(question), first=False)
        if self.question_first:
            self.cache = kvote.Cache(self.subject.model, self.cache.method)
            return self._answer(self.cache, self._prompt(self.ids, asked), question.room)
        cache = copy.deepcopy(self.cache)
        return self._answer(cache, self._question(cache, asked), question.room)

    def turn(self, question: Question, *, opening: bool) -> Answered:
        """Answers greedily and goes on holding question and answer; the first of a talk is its ``opening``."""
        template = self.subject.template
        text = template.asking(question)
        if not opening:
            text = template.next + text.removeprefix(template.between)
        asked = self.subject.ids(text, first=False)
        asked = torch.cat([asked.new_tensor([self._unread]), asked], dim=1) if self._unread else asked
        if opening and self.question_first:
            logits = self._prompt(self.ids, asked)
        else:
            self.cache.expect(asked.shape[1], question_follows=False)
            logits = self._question(self.cache, asked)
        got = self._answer(self.cache, logits, question.room)
        self._unread = got.tokens[-1:] if len(got.tokens) == question.room else []
        return got

    def _question(self, cache: kvote.Cache, asked: Tensor) -> Tensor:
        mark_next(cache, "question", cache.get_seq_length() + asked.shape[1])
        return self._feed(cache, asked)

    def _answer(self, cache: kvote.Cache, logits: Tensor, room: int) -> Answered:
        got, self.last = Answered(), cache
        while True:
            token = int(logits.argmax())
            if token in self.subject.stops:
                return got
            got.tokens.append(token)
            if len(got.tokens) == room:
                return got
            begin = time.perf_counter()
            logits = self._feed(cache, torch.tensor([[token]], device=self.ids.device))
            got.seconds.append(time.perf_counter() - begin)

    def follow(self, continuation: Tensor) -> tuple[Tensor, list[float]]:
        """Log-probabilities [t, vocabulary] in front of every token of ``continuation`` [t], and seconds per step: it
        goes through the cache token by token."""
        rows, seconds = [self.logits.log_softmax(-1)], []
        for token in continuation[:-1].tolist():
            begin = time.perf_counter()
            logits = self._feed(self.cache, torch.tensor([[token]], device=continuation.device))
            seconds.append(time.perf_counter() - begin)
            rows.append(logits.log_softmax(-1))
        return torch.stack(rows), seconds
