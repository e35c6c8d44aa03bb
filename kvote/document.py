"""Read a document once, ask it many times."""

import copy
import importlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kvote.cache import Cache
from kvote.echo import read_again
from kvote.errors import InputError, KvoteError, NotFiniteError, OutOfMemoryError
from kvote.hf.cache_layer import recording
from kvote.hf.greedy import LogitsError, finite, generate, passes, where_not_finite
from kvote.method import Method
from kvote.numbers import is_whole

TOKENS_PER_PASS = 4096


@dataclass(frozen=True)
class Answer:
    """What the model said to one question. Times are wall-clock; ``first_token_seconds`` includes the question."""

    text: str
    token_ids: list[int]
    first_token_seconds: float
    ms_per_token: float | None


class Document:
    """A text in a kvote cache. ``ask`` leaves it as it was, whatever interrupts it, so questions do not see each other;
    questions from several threads are answered one after the other.

    The text goes through ``model`` in passes of ``tokens_per_pass`` tokens, so that memory stays bounded at any
    length; ``progress`` is called with the number of tokens read after each. Raises InputError for an empty text, and
    NotFiniteError if the model gives NaN or infinite logits.
    """

    # Attributes that are saved, beside the cache.
    STATE = ("token_ids", "_tokens_per_pass", "prefill_seconds")

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        method: Method | str = "dense",
        *,
        tokens_per_pass: int = TOKENS_PER_PASS,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        if not isinstance(text, str) or not text.strip():
            raise InputError("The document is empty; give a text to read.")
        if not is_whole(tokens_per_pass) or tokens_per_pass < 1:
            raise InputError(f"tokens_per_pass must be a whole number of at least 1; got {tokens_per_pass!r}.")
        self.model, self.tokenizer = model, tokenizer
        self.cache = Cache(model, method)
        self.token_ids: Tensor = self.ids_of(text)
        if self.token_ids.shape[1] == 0:
            raise InputError("The document is empty; give a text to read.")
        self._tokens_per_pass = tokens_per_pass
        self._lock, self._asking = threading.RLock(), False
        begin = time.perf_counter()
        self._read(progress)
        self.prefill_seconds = time.perf_counter() - begin

    def ids_of(self, text: str) -> Tensor:
        """Token ids [1, n] of a text, as it is read."""
        ids: Tensor = self.tokenizer(text, return_tensors="pt").input_ids.to(self.model.device)
        return ids

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
        """Tokens of the document."""
        return self.token_ids.shape[1]

    def ask(self, question: str, *, max_new_tokens: int = 32) -> Answer:
        """Generates greedily from the document followed by ``question``, whatever the model's generation config says.

        Raises InputError for an empty question or no tokens to generate, NotFiniteError if the model gives NaN or
        infinite logits, UnsupportedModelError if it did not answer from the cache, and OutOfMemoryError if there is no
        room for the copy in which a method that drops tokens answers.
        """
        if not isinstance(question, str):
            raise InputError(f"A question is a text; got a {type(question).__name__}.")
        if not is_whole(max_new_tokens) or max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be a whole number of at least 1; got {max_new_tokens!r}.")
        asked = self.tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids.to(self.model.device)
        if asked.shape[1] == 0:
            raise InputError("The question is empty; ask something.")
        with self._lock:
            if self._asking:
                raise InputError("This document is in the middle of an answer; ask again when that has come.")
            self._asking = True
            try:
                return self._answer(asked, max_new_tokens)
            finally:
                self._asking = False

    def _answer(self, asked: Tensor, max_new_tokens: int) -> Answer:
        if not self._roll_back():
            # An interruption came where nothing could be taken back.
            self._read()
        # A method that drops tokens cannot roll an answer back, but what it holds is small enough to copy.
        cache = self.cache if self.cache.is_croppable else self._copy()
        ids = torch.cat([self.token_ids, asked], dim=1)
        clock = _Clock()
        try:
            with recording(cache):
                try:
                    new = generate(self.model, ids, cache, max_new_tokens, clock)
                finally:
                    self._roll_back()
        except LogitsError as error:
            raise NotFiniteError(self._who_is_not_finite(error.ids)) from None
        text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        return Answer(text, new, clock.first, clock.ms_per_token)

    def _read(self, progress: Callable[[int], None] | None = None) -> None:
        """Puts the document, and nothing else, into the cache."""
        self.cache.reset()
        self.cache.expect(len(self), question_follows=True)
        with torch.no_grad():
            for ids in passes(self.token_ids, self.model, self._tokens_per_pass):
                output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
                if not finite(output.logits[:, -1]):
                    raise NotFiniteError(self._who_is_not_finite(self.token_ids))
                if progress is not None:
                    progress(ids.shape[1])
        read_again(self.model, self.cache, self.token_ids, tokenizer=self.tokenizer)

    def _roll_back(self) -> bool:
        """Forgets all that came behind the document; False if what is left is not the document."""
        if self.cache.holds(len(self)):
            return True
        try:
            self.cache.crop_to(len(self))
        except KvoteError:
            return False
        return True

    def _copy(self) -> Cache:
        try:
            return copy.deepcopy(self.cache)
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "memory" in str(error):
                raise OutOfMemoryError(
                    f"There is no memory for a copy of the {self.cache.nbytes():,} bytes that {self.cache.method.spec} "
                    "holds, from which it answers; free some, or use a method that drops no tokens."
                ) from error
            raise

    def _who_is_not_finite(self, ids: Tensor) -> str:
        """A sentence that names the first layer that gives what is no number, found by reading ``ids`` again."""
        cache, fine = Cache(self.model, self.cache.method), True
        cache.expect(ids.shape[1])
        with torch.no_grad(), where_not_finite(self.model) as found:
            for part in passes(ids, self.model, self._tokens_per_pass):
                output = self.model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
                fine = finite(output.logits[:, -1])
                if found or not fine:
                    break
        where = f"{found[0]} is the first to give some" if found else "its layers do not, so its output head does"
        if fine and not found:
            where = "not so when the same text was read again"
        return (
            f"{type(self.model).__name__} gave NaN or infinite logits: {where}; check its weights and load it in "
            "float32 or bfloat16."
        )


class _Clock(BaseStreamer):
    """Notes when each token comes."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, value: Tensor) -> None:
        # The first call carries the prompt, before any work is done.
        if value.dim() < 2:
            self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def first(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def ms_per_token(self) -> float | None:
        steps = [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]
        return 1000 * median(steps) if steps else None
