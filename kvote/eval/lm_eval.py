"""lm-evaluation-harness: every request of a task goes through a fresh kvote cache.

    lm_eval.simple_evaluate(KvoteLM("model", "h2o(budget=0.25)"), tasks=["lambada_openai"])

A method that drops or encodes tokens does so behind a prompt, so a likelihood computed in one pass of context and
continuation would be that of dense attention. Here the context is one pass, and the continuation follows token
by token, one request at a time, so that no padding comes near a cache. Generation follows ``batch_size``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from kvote import Cache, InactiveCacheError


@register_model("kvote")
class KvoteLM(HFLM):
    """``HFLM`` with a cache of ``method``; other arguments are its own. ``requests`` counts what went through a cache,
    ``report`` is that of the last."""

    def __init__(self, pretrained: Any, method: str = "dense", **kwargs: Any) -> None:
        super().__init__(pretrained=pretrained, **kwargs)
        self.method, self.requests = method, 0
        self.report: Any = None
        # Refused now, not in the middle of a task.
        Cache(self.model, method)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        cache = Cache(self.model, self.method)
        made: Tensor = super()._model_generate(context, max_length, stop, past_key_values=cache, **generation_kwargs)
        self._note(cache, made.shape[1] - 1, requests=len(made))
        return made

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = []
        read: tuple[tuple[int, ...], Cache, Tensor] | None = None
        for strings, context, continuation in tqdm(requests, disable=disable_tqdm, desc="kvote likelihoods"):
            # The last token is only predicted; of a text that is too long, the end counts, as in the harness.
            room = self.max_length + 1 - len(continuation)
            prompt = tuple(context[-room:]) if room > 0 else tuple(context[-1:])
            if read is None or read[0] != prompt:
                cache = Cache(self.model, self.method)
                read = prompt, cache, self._feed(cache, list(prompt))
            cache, logits = read[1].fork(), read[2]
            total, greedy = 0.0, True
            for i, token in enumerate(continuation):
                total += float(logits.log_softmax(-1)[token])
                greedy = greedy and int(logits.argmax()) == token
                if i + 1 < len(continuation):
                    logits = self._feed(cache, [token])
            self._note(cache, len(prompt) + len(continuation) - 1)
            answers.append((total, greedy))
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answers[-1])
        return answers

    def _feed(self, cache: Cache, ids: list[int]) -> Tensor:
        """Logits [vocabulary] behind ``ids``, float32."""
        with torch.no_grad():
            output = self.model(torch.tensor([ids], device=self.device), past_key_values=cache, use_cache=True)
        logits: Tensor = output.logits[0, -1].float()
        return logits

    def _note(self, cache: Cache, tokens: int, requests: int = 1) -> None:
        """Raises InactiveCacheError if a request did not go through its cache."""
        if cache.get_seq_length() != tokens:
            raise InactiveCacheError(
                f"A request of {tokens} tokens left {cache.get_seq_length()} in its cache: it was answered without."
            )
        self.requests += requests
        self.report = cache.report()
