"""Prefixes: what was read of earlier prompts, for later ones that begin alike."""

import hashlib
from functools import lru_cache

import torch
from transformers import PreTrainedModel

from kvote import Cache, Library, Method
from kvote.library.scope import Reading, scope_of
from kvote.saving import identity
from kvote.serve.job import Job

# Prompts that are read in a moment anyway.
_SHORTEST = 64


class Prefixes:
    """A ``library`` for requests of one model. A request finds what was read for others of the same key, or of all
    keys if ``shares``: how fast an answer comes tells whether somebody has sent its beginning.

    ``chunk``: tokens that are read at a time, which decides how prompts are rounded.
    """

    def __init__(self, model: PreTrainedModel, library: Library, *, chunk: int, shares: bool) -> None:
        self.library, self.chunk, self.shares = library, chunk, shares
        # Weights are looked at once: those of a server do not change, and clients may name any number of methods.
        known = identity.of_model(model)
        self._scope = lru_cache(256)(lambda method, reading: scope_of(model, method, reading, known))

    def find(self, job: Job, fresh: Cache) -> tuple[Cache, int]:
        """A cache for the prompt, and how many of its tokens were read already; ``fresh`` and 0 if none were."""
        scope = self._of(job, fresh.method)
        if scope is None:
            return fresh, 0
        cache, reused, spared = self.library.lend(scope, fresh, torch.tensor([list(job.ids)]), self._reading(job))
        # What is held of the whole prompt is worth what reading all of it would take.
        job.reading_seconds += spared
        return cache, reused

    def keep(self, job: Job, cache: Cache, seconds: float) -> None:
        """Holds what ``cache`` has read, which is all of the prompt."""
        scope = self._of(job, cache.method)
        if scope is not None:
            self.library.keep(scope, cache, torch.tensor([list(job.ids)]), seconds)

    def _reading(self, job: Job) -> Reading:
        return Reading(self.chunk, job.question_follows)

    def _of(self, job: Job, method: Method) -> str | None:
        """By what prompts share; None for one that is not worth it, goes on behind a document, or cannot be shared."""
        if job.prefix is not None or len(job.ids) < _SHORTEST:
            return None
        scope = self._scope(method, self._reading(job))
        if scope is None:
            return None
        return hashlib.sha256(f"{scope} {'' if self.shares else job.owner}".encode()).hexdigest()
