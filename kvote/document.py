"""Read a document once, ask it many times."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from kvote.cache import Cache
from kvote.errors import InputError
from kvote.method import Method

_PASS = 4096


@dataclass(frozen=True)
class Answer:
    """What the model said to one question. Times are wall-clock; ``first_token_seconds`` includes the question."""

    text: str
    token_ids: list[int]
    first_token_seconds: float
    ms_per_token: float | None


class Document:
    """A text in a kvote cache. ``ask`` leaves it as it was, so questions do not see each other.

    The text goes through ``model`` in passes of ``tokens_per_pass`` tokens, so that memory stays bounded at any
    length; ``progress`` is called with the number of tokens read after each. Raises InputError for an empty text.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        method: Method | str = "dense",
        *,
        tokens_per_pass: int = _PASS,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.token_ids: Tensor = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        if not text.strip() or self.token_ids.shape[1] == 0:
            raise InputError("The document is empty; give a text to read.")
        self.cache = Cache(model, method)
        self.cache.expect(len(self), question_follows=True)
        begin = time.perf_counter()
        with torch.no_grad():
            for start in range(0, len(self), tokens_per_pass):
                ids = self.token_ids[:, start : start + tokens_per_pass]
                model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
                if progress is not None:
                    progress(ids.shape[1])
        self.prefill_seconds = time.perf_counter() - begin

    def __len__(self) -> int:
        """Tokens of the document."""
        return self.token_ids.shape[1]

    def ask(self, question: str, *, max_new_tokens: int = 32) -> Answer:
        """Generates greedily from the document followed by ``question``. Raises InputError for an empty question."""
        asked = self.tokenizer(question, return_tensors="pt", add_special_tokens=False).input_ids.to(self.model.device)
        if asked.shape[1] == 0:
            raise InputError("The question is empty; ask something.")
        # A method that drops tokens cannot roll an answer back, but what it holds is small enough to copy.
        cache = self.cache if self.cache.is_croppable else copy.deepcopy(self.cache)
        ids = torch.cat([self.token_ids, asked], dim=1)
        clock = _Clock()
        try:
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=clock,
            )
        finally:
            if cache is self.cache:
                cache.crop(len(self) - cache.get_seq_length())
        new = output[0, ids.shape[1] :].tolist()
        text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        return Answer(text, new, clock.first, clock.ms_per_token)


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
