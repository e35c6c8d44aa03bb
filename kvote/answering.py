"""Answering: a text is fed into a cache, and the model goes on from there."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kvote.cache import Cache
from kvote.errors import InputError, KvoteError, NotFiniteError, OutOfMemoryError
from kvote.extra_inputs import MARKS
from kvote.hf.greedy import LogitsError, finite, generate, passes, where_not_finite
from kvote.report import Report
from kvote.store.uncompressed import Uncompressed

# Default lengths of an answer: of a chat model, and of a base model.
TALKING, COMPLETING = 256, 32


@dataclass(frozen=True)
class Answer:
    """The model's answer to one question. Times are wall-clock; ``first_token_seconds`` includes the question.
    ``report`` is the report of the cache that answered it."""

    text: str
    token_ids: list[int]
    first_token_seconds: float
    ms_per_token: float | None
    report: Report | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Responder:
    """A model that reads and answers, ``tokens_per_pass`` tokens at a time."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens_per_pass: int

    def feed(self, cache: Cache, ids: Tensor, progress: Callable[[int], None] | None = None) -> None:
        """Puts tokens [1, n] behind those that ``cache`` holds. Raises NotFiniteError."""
        with torch.no_grad():
            for part in passes(ids, self.model, self.tokens_per_pass):
                output = self.model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
                if not finite(output.logits[:, -1]):
                    raise NotFiniteError(self._who_is_not_finite(cache, ids))
                if progress is not None:
                    progress(part.shape[1])

    def answer(
        self,
        cache: Cache,
        ids: Tensor,
        settings: dict[str, Any],
        streamer: BaseStreamer | None = None,
        stopping: Sequence[Any] = (),
    ) -> Answer:
        """Generates the answer that follows ``ids`` [1, n], of which ``cache`` holds the first. Afterwards the cache
        holds the answer too, unless several beams are searched, in a copy.

        Raises InputError for options that make no sense, NotFiniteError, UnsupportedModelError if the model did not
        answer from the cache, and OutOfMemoryError.
        """
        beams = settings["num_beams"]
        if beams > 1:
            if streamer is not None:
                raise InputError("An answer that is searched with num_beams comes at its end; leave streaming out.")
            cache = copied(cache)
            cache.batch_repeat_interleave(beams)
        more: dict[str, Any] = {"streamer": streamer}
        if stopping:
            more["stopping_criteria"] = [*stopping, *(settings.get("stopping_criteria") or ())]
        if settings.get("stop_strings"):
            more["tokenizer"] = self.tokenizer
        times = [time.perf_counter()]
        try:
            new = generate(self.model, ids, cache, settings, lambda: times.append(time.perf_counter()), **more)
        except LogitsError as error:
            raise NotFiniteError(self._who_is_not_finite(cache, error.ids[:1])) from None
        except KvoteError:
            raise
        except (TypeError, ValueError) as error:
            if len(times) > 1 or "generation" not in _files(error):
                raise
            why = f"generate() does not take these options: {' '.join(str(error).split())}"
            if "stopping_criteria" in _files(error):
                why = "transformers cannot look for stop_strings with this tokenizer; leave them out"
            raise InputError(why) from error
        text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        return Answer(text, new, times[1] - times[0], _ms_per_token(times), cache.report())

    def _who_is_not_finite(self, cache: Cache, ids: Tensor) -> str:
        """A sentence that names the first layer that gives what is no number, found by reading ``ids`` again."""
        again, fine = Cache(self.model, cache.method), True
        again.expect(ids.shape[1])
        again.announced.marked = cache.announced.marked
        with torch.no_grad(), where_not_finite(self.model) as found:
            for part in passes(ids, self.model, self.tokens_per_pass):
                output = self.model(input_ids=part, past_key_values=again, use_cache=True, logits_to_keep=1)
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


def mark_next(cache: Cache, name: str, stop: int) -> None:
    """Marks what ``cache`` reads next, up to column ``stop``, where its method asks for marks."""
    start = cache.get_seq_length()
    if MARKS in cache.method.needs.extra_inputs and start < stop:
        cache.announced.marked = cache.announced.marked.until(start)
        cache.mark_span(name, start, stop)


def takes_back(cache: Cache) -> bool:
    """Whether an answer can be forgotten without a trace: it makes the method drop nothing, and encode nothing, which
    would come back as it decodes."""
    return bool(cache.is_croppable) and isinstance(cache.method.store, Uncompressed)


def copied(cache: Cache) -> Cache:
    """An independent copy. Raises OutOfMemoryError."""
    try:
        return copy.deepcopy(cache)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise OutOfMemoryError(
                f"There is no memory for a copy of the {cache.nbytes():,} bytes that {cache.method.spec} holds, from "
                "which it answers; free some, or use a method that drops and encodes no tokens."
            ) from error
        raise


def _ms_per_token(times: list[float]) -> float | None:
    steps = [b - a for a, b in pairwise(times[1:])]
    return 1000 * median(steps) if steps else None


def _files(error: BaseException) -> str:
    """The file in which it was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_code.co_filename
