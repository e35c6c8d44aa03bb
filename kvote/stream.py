"""Stream: an answer piece by piece, as it comes."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, TextStreamer

from kvote.answering import Answer
from kvote.errors import InputError

# Runs one answer, with a streamer that is given its tokens and a criterion that ends it.
Run = Callable[[TextStreamer, StoppingCriteria], Answer]


class Pieces(TextStreamer):
    """Calls ``emit`` with text as soon as whole words have come, without white space around the whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._emit, self._space, self._begun = emit, "", False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """White space waits for the words behind it."""
        text = self._space + text
        words = text.rstrip()
        self._space = text[len(words) :]
        if words:
            self._emit(words if self._begun else words.lstrip())
            self._begun = True


class Stream(Iterator[str]):
    """Iterates over pieces of an answer's text while it is generated in a thread of its own; together they are the
    text. ``answer`` is the whole of it, once all have come.

    ``close`` (or leaving a ``with`` block) ends the answer after the token that is being made, and waits for that.
    What goes wrong is raised by the iterator.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, run: Run) -> None:
        self._come: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._run, self._end = run, _End()
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._pieces = Pieces(tokenizer, self._come.put)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def answer(self) -> Answer:
        """Raises InputError before all of it has come."""
        if self._answer is None:
            raise InputError("The answer has not come yet; iterate to its end first.")
        return self._answer

    def __next__(self) -> str:
        piece = self._come.get()
        if piece is not None:
            return piece
        # Whoever asks again is told the same.
        self._come.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def close(self) -> None:
        """Ends the answer where it is. Raises nothing."""
        self._end.asked = True
        self._thread.join()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _work(self) -> None:
        try:
            self._answer = self._run(self._pieces, self._end)
        except BaseException as error:
            self._error = error
        finally:
            self._come.put(None)


class _End(StoppingCriteria):
    """Ends an answer when it is asked to."""

    asked = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.asked, dtype=torch.bool, device=input_ids.device)
