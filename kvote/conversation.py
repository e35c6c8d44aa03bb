"""Conversation: questions and answers that see each other, all in one cache."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kvote.answering import COMPLETING, TALKING, Answer, Responder, copied, mark_next, takes_back
from kvote.cache import Cache
from kvote.errors import InputError, KvoteError
from kvote.hf.settings import settings_of
from kvote.method import Method
from kvote.prompt import Layout, document_ids, layout_of, question_ids
from kvote.stream import Stream


@dataclass(frozen=True)
class Turn:
    """One question and the model's answer."""

    said: str
    answer: Answer


class Conversation:
    """Keeps its turns in a cache: each is read once, and a method that drops, merges or encodes tokens goes on doing
    so, with every message as a prompt of its own. Where ``tokenizer`` has a chat template, it stands around all of it,
    with ``system`` as the system message; ``raw`` goes without. A turn that fails leaves the conversation as it was.

    ``method`` may be a cache that holds ``token_ids`` [1, n], laid out as ``layout`` says, about which the first turn
    asks (``Document.chat``). Raises InputError for a system message without a place.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        method: Method | str | Cache = "dense",
        *,
        system: str | None = None,
        raw: bool = False,
        layout: Layout | None = None,
        token_ids: Tensor | None = None,
        tokens_per_pass: int = 4096,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.cache = method if isinstance(method, Cache) else Cache(model, method)
        self.layout = layout_of(tokenizer, system=system, raw=raw) if layout is None else layout
        self.token_ids = torch.empty(1, 0, dtype=torch.long) if token_ids is None else token_ids
        self.turns: list[Turn] = []
        self._responder = Responder(model, tokenizer, tokens_per_pass)
        self._lock, self._talking = threading.RLock(), False

    def __len__(self) -> int:
        """Tokens so far, those of a document among them."""
        return self.token_ids.shape[1]

    def say(
        self,
        message: str,
        *,
        max_new_tokens: int | None = None,
        generation_config: GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        **options: Any,
    ) -> Answer:
        """The answer to ``message``; arguments and errors as those of ``Document.ask``, and InputError for num_beams:
        a conversation goes on from one sequence."""
        said, settings = self._prepared(message, max_new_tokens, generation_config, options)
        return self._say(message, said, settings, streamer)

    def stream(
        self,
        message: str,
        *,
        max_new_tokens: int | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Stream:
        """Does what ``say`` does and yields pieces of text as they come; closed early, the turn ends with what has been
        said."""
        said, settings = self._prepared(message, max_new_tokens, generation_config, options)
        return Stream(self.tokenizer, lambda pieces, end: self._say(message, said, settings, pieces, [end]))

    def _prepared(
        self, message: str, count: int | None, config: GenerationConfig | None, options: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        if count is not None:
            options = options | {"max_new_tokens": count}
        settings = settings_of(self.model, config, options, TALKING if self.layout.templated else COMPLETING)
        if settings["num_beams"] > 1:
            raise InputError("A conversation goes on from one sequence; leave num_beams out.")
        lead = self.layout.closing if self.turns else self.layout.between if len(self) else self.layout.before
        if len(self) or self.layout.templated:
            said = question_ids(self.tokenizer, self.layout, message, lead)
        else:
            question_ids(self.tokenizer, self.layout, message)
            said = document_ids(self.tokenizer, self.layout, message)
        return said.to(self.model.device), settings

    def _say(
        self,
        message: str,
        said: Tensor,
        settings: dict[str, Any],
        streamer: BaseStreamer | None,
        stopping: Sequence[Any] = (),
    ) -> Answer:
        with self._lock:
            if self._talking:
                raise InputError("This conversation is in the middle of an answer; go on when that has come.")
            self._talking = True
            try:
                ids = torch.cat([self.token_ids.to(said.device), said], dim=1)
                answer = self._answer(ids, settings, streamer, stopping)
                # The template, or the next message, ends the turn.
                ends = settings["eos_token_id"]
                ends = ends if isinstance(ends, list | tuple) else [ends]
                new = answer.token_ids[:-1] if answer.token_ids[-1] in ends else answer.token_ids
                self.token_ids = torch.cat([ids, ids.new_tensor([new])], dim=1)
                self.turns.append(Turn(message, answer))
                return answer
            finally:
                self._talking = False

    def _answer(
        self, ids: Tensor, settings: dict[str, Any], streamer: BaseStreamer | None, stopping: Sequence[Any]
    ) -> Answer:
        before = self.cache.get_seq_length()
        # What a method holds that drops or encodes tokens is small enough to copy.
        spare = None if takes_back(self.cache) else copied(self.cache)
        try:
            self.cache.expect(ids.shape[1] - before)
            mark_next(self.cache, "question", ids.shape[1])
            # The last pass is left to generate().
            size = self._responder.tokens_per_pass
            whole = before + (ids.shape[1] - before - 1) // size * size
            if whole > before:
                self._responder.feed(self.cache, ids[:, before:whole])
            return self._responder.answer(self.cache, ids, settings, streamer, stopping)
        except BaseException:
            self._take_back(before, spare)
            raise

    def _take_back(self, before: int, spare: Cache | None) -> None:
        """Leaves in the cache what it held, or nothing, and then the next turn reads everything again."""
        if spare is not None:
            self.cache = spare
            return
        try:
            if not self.cache.holds(before):
                self.cache.crop_to(before)
        except KvoteError:
            self.cache = Cache(self.model, self.cache.method)
