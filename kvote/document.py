"""Read a document once, ask it many times."""

import importlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kvote.answering import COMPLETING, TALKING, Responder, copied, mark_next, takes_back
from kvote.answering import Answer as Answer
from kvote.cache import Cache
from kvote.conversation import Conversation
from kvote.errors import InputError, KvoteError
from kvote.extra_inputs import MARKS
from kvote.hf.cache_layer import recording
from kvote.hf.settings import settings_of
from kvote.library.library import Library
from kvote.method import Method
from kvote.numbers import is_whole
from kvote.prompt import document_ids, layout_of, question_ids
from kvote.repeat import read_again
from kvote.stream import Stream

TOKENS_PER_PASS = 4096


class Document:
    """A text in a kvote cache. ``ask`` leaves it as it was, whatever interrupts it, so questions do not see each other;
    questions from several threads are answered one after the other.

    Where ``tokenizer`` has a chat template, it stands around document and question, with ``system`` as its system
    message; ``raw`` goes without. ``queries`` names what will be asked: a method that drops tokens reads it behind the
    document, decides by it what stays, and forgets it; others need not know.

    The text goes through ``model`` in passes of ``tokens_per_pass`` tokens, so that memory stays bounded at any length;
    ``progress`` is called with the number of tokens read after each. ``lazy``: not now, but when a question needs it.
    Where the method needs marks, document and questions are marked, with what the template puts around them.
    ``library``: what it has read of the same text is not read again, and it remembers the rest; not with ``queries``.

    Raises InputError for an empty text, and NotFiniteError if the model gives NaN or infinite logits.
    """

    # Attributes that are saved, beside the cache.
    STATE = ("layout", "token_ids", "_queries", "_tokens_per_pass", "prefill_seconds")

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        method: Method | str = "dense",
        *,
        queries: str | None = None,
        system: str | None = None,
        raw: bool = False,
        lazy: bool = False,
        tokens_per_pass: int = TOKENS_PER_PASS,
        progress: Callable[[int], None] | None = None,
        library: Library | None = None,
    ) -> None:
        if not isinstance(text, str) or not text.strip():
            raise InputError("The document is empty; give a text to read.")
        if not is_whole(tokens_per_pass) or tokens_per_pass < 1:
            raise InputError(f"tokens_per_pass must be a whole number of at least 1; got {tokens_per_pass!r}.")
        self.model, self.tokenizer = model, tokenizer
        self.cache = Cache(model, method)
        self.layout = layout_of(tokenizer, system=system, raw=raw)
        self.token_ids: Tensor = self.ids_of(text)
        if self.token_ids.shape[1] == 0:
            raise InputError("The document is empty; give a text to read.")
        self._queries: Tensor | None = None
        if queries is not None:
            self._queries = question_ids(tokenizer, self.layout, queries).to(model.device)
        self._tokens_per_pass, self._progress, self._library = tokens_per_pass, progress, library
        self._lock, self._asking = threading.RLock(), False
        self.prefill_seconds = 0.0
        if not lazy:
            self._read()

    def ids_of(self, text: str) -> Tensor:
        """Token ids [1, n] of a text, as it is read."""
        return document_ids(self.tokenizer, self.layout, text).to(self.model.device)

    def save(self, path: str | Path) -> None:
        """Writes the document as it is held into a file of mode 0600, at once: any failure leaves the old file.

        Raises InputError where it cannot be written, and in the middle of an answer.
        """
        importlib.import_module("kvote.saving.documents").save(self, path)

    @staticmethod
    def load(
        path: str | Path,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        text: str | None = None,
        method: Method | str | None = None,
        **reading: Any,
    ) -> "Document":
        """The document in a file that ``save`` wrote; it answers exactly as the saved one would have.

        ``text``: what to read again, with a warning, where the file cannot be used; ``method``: that of the saved one,
        where the file cannot tell; ``reading``: what else ``Document`` takes then. Raises InputError for a file that is
        damaged, or was made with another model, other weights or another tokenizer, and MethodError for want of a
        method.
        """
        saving = importlib.import_module("kvote.saving.documents")
        made: Document = saving.load(path, model, tokenizer, text, method, reading)
        return made

    @contextmanager
    def quiet(self) -> Iterator[Cache]:
        """The cache with the document and nothing else, while nobody asks. Raises InputError in an answer."""
        with self._lock:
            if self._asking:
                raise InputError("This document is in the middle of an answer; save it when that has come.")
            if not self._roll_back():
                self._read()
            yield self.cache

    def __len__(self) -> int:
        """Tokens of the document, with what stands in front of it."""
        return self.token_ids.shape[1]

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int | None = None,
        question_first: bool = False,
        generation_config: GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        **options: Any,
    ) -> Answer:
        """Generates from the document followed by ``question``: greedily, whatever the model's generation config says,
        unless ``generation_config`` or ``options`` of generate() (``temperature``, ``top_p``, ``num_beams``,
        ``stop_strings``, ...) say otherwise; options that sample turn sampling on. Without ``max_new_tokens``, at most
        256 tokens in a chat template, 32 without one.

        ``question_first`` reads the document anew together with the question, as one prompt, so that a method which
        drops or encodes tokens at a prompt's end knows what is asked; ``first_token_seconds`` includes that.
        ``streamer`` is given tokens as they come.

        Raises InputError for an empty question or options that make no sense, NotFiniteError if the model gives NaN or
        infinite logits, UnsupportedModelError if it did not answer from the cache, and OutOfMemoryError if there is no
        room for the copy in which a method that drops or encodes tokens answers.
        """
        asked, settings = self._prepared(question, max_new_tokens, generation_config, options)
        return self._ask(asked, settings, question_first, streamer)

    def stream(
        self,
        question: str,
        *,
        max_new_tokens: int | None = None,
        question_first: bool = False,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Stream:
        """Does what ``ask`` does and yields pieces of text as they come; closed early, the document is as before,
        too."""
        asked, settings = self._prepared(question, max_new_tokens, generation_config, options)
        if settings["num_beams"] > 1:
            raise InputError("An answer that is searched with num_beams comes at its end; use ask.")
        return Stream(self.tokenizer, lambda pieces, end: self._ask(asked, settings, question_first, pieces, [end]))

    def chat(self) -> Conversation:
        """A conversation about the document, in a copy of what it holds. Raises OutOfMemoryError."""
        with self._lock:
            if not self._roll_back():
                self._read()
            cache = copied(self.cache)
        return Conversation(
            self.model,
            self.tokenizer,
            cache,
            layout=self.layout,
            token_ids=self.token_ids,
            tokens_per_pass=self._tokens_per_pass,
        )

    def _prepared(
        self, question: str, count: int | None, config: GenerationConfig | None, options: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Tokens [1, n] of the question, and all settings of generate()."""
        fewest = TALKING if self.layout.templated else COMPLETING
        if count is not None:
            options = options | {"max_new_tokens": count}
        settings = settings_of(self.model, config, options, fewest)
        return question_ids(self.tokenizer, self.layout, question).to(self.model.device), settings

    def _ask(
        self,
        asked: Tensor,
        settings: dict[str, Any],
        question_first: bool,
        streamer: BaseStreamer | None,
        stopping: Sequence[Any] = (),
    ) -> Answer:
        with self._lock:
            if self._asking:
                raise InputError("This document is in the middle of an answer; ask again when that has come.")
            self._asking = True
            try:
                ids = torch.cat([self.token_ids, asked], dim=1)
                if question_first:
                    cache = Cache(self.model, self.cache.method)
                    cache.expect(ids.shape[1])
                    mark_next(cache, "document", len(self))
                    begin = time.perf_counter()
                    self._responder.feed(cache, self.token_ids, self._progress)
                    reading = time.perf_counter() - begin
                    mark_next(cache, "question", ids.shape[1])
                    answer = self._responder.answer(cache, ids, settings, streamer, stopping)
                    return replace(answer, first_token_seconds=reading + answer.first_token_seconds)
                if not self._roll_back():
                    # An interruption came where nothing could be taken back.
                    self._read()
                # What a method holds that drops or encodes tokens is small enough to copy.
                cache = self.cache if takes_back(self.cache) else copied(self.cache)
                mark_next(cache, "question", ids.shape[1])
                with recording(cache):
                    try:
                        return self._responder.answer(cache, ids, settings, streamer, stopping)
                    finally:
                        self._roll_back()
            finally:
                self._asking = False

    @property
    def _responder(self) -> Responder:
        return Responder(self.model, self.tokenizer, self._tokens_per_pass)

    def _read(self) -> None:
        """Puts the document, and nothing else, into the cache."""
        begin = time.perf_counter()
        asked = self._queries if self.cache.method.keep.offers.drops else None
        # A library shares what was read for any reason, so without marks.
        if self._library is not None and asked is None and MARKS not in self.cache.method.needs.extra_inputs:
            self.cache = self._library.read(self)
            self.prefill_seconds = time.perf_counter() - begin
            return
        self.cache.reset()
        self.cache.expect(len(self) + (0 if asked is None else asked.shape[1]), question_follows=True)
        mark_next(self.cache, "document", len(self))
        self._responder.feed(self.cache, self.token_ids, self._progress)
        if asked is not None:
            with recording(self.cache):
                for layer in self.cache.managed:
                    layer.record_past = True
                mark_next(self.cache, "question", len(self) + asked.shape[1])
                self._responder.feed(self.cache, asked)
                self.cache.forget_shown(asked.shape[1])
        read_again(self.model, self.cache, self.token_ids, tokenizer=self.tokenizer)
        self.prefill_seconds = time.perf_counter() - begin

    def _roll_back(self) -> bool:
        """Forgets all that came behind the document; False if what is left is not the document."""
        if self.cache.holds(len(self)):
            return True
        try:
            self.cache.crop_to(len(self))
        except KvoteError:
            return False
        return True
