"""The engine: prompts are read in chunks, and all answers in hand get their next token in one pass of the model."""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvote import Cache, NotFiniteError, Rows
from kvote.peak import peak_bytes, shape_of
from kvote.prompt import ends_of
from kvote.serve.errors import ApiError
from kvote.serve.job import Done, Job, Piece, Row, Usage
from kvote.serve.metrics import Metrics
from kvote.serve.prefixes import Prefixes
from kvote.serve.sampling import Sampler
from kvote.serve.text import TextStream

log = logging.getLogger("kvote.serve")


@dataclass(frozen=True)
class Limits:
    """``rows``: answers generated at a time. ``queue``: requests that may wait. ``chunk``: tokens of prompts read
    between two steps of the others. ``context``: tokens of a prompt and its answer. ``nbytes``: of all caches."""

    rows: int = 16
    queue: int = 256
    chunk: int = 512
    context: int = 131_072
    nbytes: int = 2**33


class Engine:
    """Runs ``model`` in a thread of its own. Jobs join and leave between two passes. ``prefixes``: where what was read
    is looked for and left."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        limits: Limits,
        metrics: Metrics,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.model, self.tokenizer, self.limits, self.metrics = model, tokenizer, limits, metrics
        self._prefixes = prefixes
        self.shape = shape_of(model)
        self.ends = ends_of(model, tokenizer)
        # Passes of the model in which answers got their next token, and tokens they got.
        self.steps = self.generated = 0
        self._waiting: deque[Job] = deque()
        self._reading: deque[Job] = deque()
        self._rows: list[Row] = []
        self._batch = Rows(model)
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kvote-engine", daemon=True)

    # Called from other threads.

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends after the pass in hand; every job that is left is told."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Queues a job. Raises ApiError for one that never fits, and for one that finds the queue full."""
        tokens = job.prompt_tokens + job.max_tokens
        if tokens > self.limits.context:
            raise ApiError(
                400,
                f"{job.prompt_tokens:,} tokens of prompt and {job.max_tokens:,} to generate are more than the "
                f"{self.limits.context:,} that this server takes.",
                param="max_tokens" if job.prompt_tokens < self.limits.context else None,
                code="context_length_exceeded",
            )
        job.foreseen = self._foresee(job)
        if job.foreseen > self.limits.nbytes:
            raise ApiError(
                400,
                f"{tokens:,} tokens with {job.method.spec} need {job.foreseen:,} bytes at the peak, and this server "
                f"has {self.limits.nbytes:,}; send less, or name a kv_method that holds less.",
                code="context_length_exceeded",
            )
        with self._changed:
            if self._stopping or (self._thread.ident is not None and not self._thread.is_alive()):
                raise ApiError(503, "The server is shutting down; send the request again later.")
            if len(self._waiting) >= self.limits.queue:
                raise ApiError(429, f"{len(self._waiting):,} requests wait already; try again soon.", code="queue_full")
            self._waiting.append(job)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for ``job`` any more: it leaves before the next pass."""
        with self._changed:
            job.cancelled.set()
            self._changed.notify()

    def _foresee(self, job: Job) -> int:
        if self.shape is None:
            return 0
        own = len(job.ids) + job.max_tokens
        bytes_once = peak_bytes(job.method, self.shape, max(1, own), tokens_per_pass=self.limits.chunk)
        answers = peak_bytes(job.method, self.shape, max(1, job.max_tokens), tokens_per_pass=self.limits.chunk)
        return bytes_once + (job.n - 1) * answers

    # The engine's thread.

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._waiting or self._reading or self._rows):
                    self._changed.wait()
                if self._stopping:
                    break
            self._sort_out()
            with torch.inference_mode():
                self._read_some()
                self._generate()
        over = ApiError(503, "The server is shutting down; send the request again later.")
        for job in self._jobs():
            job.emit(Done(error=over))

    def _jobs(self) -> list[Job]:
        return [*self._waiting, *self._in_hand()]

    def _in_hand(self) -> list[Job]:
        """The jobs that are read or answered now."""
        return list(dict.fromkeys((*self._reading, *(row.job for row in self._rows))))

    def _sort_out(self) -> None:
        """Lets go of cancelled jobs, and begins those for which there is room."""
        for row in [row for row in self._rows if row.job.cancelled.is_set()]:
            self._leave(row)
        for queue in (self._waiting, self._reading):
            with self._changed:
                for job in [job for job in queue if job.cancelled.is_set()]:
                    queue.remove(job)
        with self._changed:
            while self._waiting and self._fits(self._waiting[0]):
                self._reading.append(self._waiting.popleft())
            self.metrics.waiting.set(len(self._waiting))
        self.metrics.running.set(len(self._rows) + len(self._reading))

    def _fits(self, job: Job) -> bool:
        """Whether its rows and bytes fit beside those of all jobs in hand."""
        others = self._in_hand()
        rows = sum(other.n for other in others)
        if rows and rows + job.n > self.limits.rows:
            return False
        return sum(other.foreseen for other in others) + job.foreseen <= self.limits.nbytes

    def _read_some(self) -> None:
        """One chunk of the prompt that has waited longest; the others take turns."""
        if not self._reading:
            return
        job = self._reading.popleft()
        try:
            if job.cache is None:
                job.cache = self._opened(job)
            started = time.perf_counter()
            # Passes end where they do for a prompt of which nothing was known.
            chunk = job.ids[job.read : job.read + self.limits.chunk - job.read % self.limits.chunk]
            ids = torch.tensor([list(chunk)], device=self.model.device)
            logits = self._forward(input_ids=ids, past_key_values=job.cache, use_cache=True)[0]
            job.read += len(chunk)
            job.reading_seconds += time.perf_counter() - started
            self.metrics.prompt_tokens.inc(len(chunk))
            if job.read < len(job.ids):
                self._reading.append(job)
                return
            if self._prefixes is not None:
                self._prefixes.keep(job, job.cache, job.reading_seconds)
            if job.max_tokens == 0:
                job.emit(Done(self._usage(job, job.cache, 0)))
            else:
                self._begin(job, logits)
        except Exception as error:
            self._fail([job], error)

    def _opened(self, job: Job) -> Cache:
        """The cache of a job that begins, behind its document or what was read for an earlier request."""
        if job.prefix is not None:
            cache = job.prefix.fork()
        else:
            cache = Cache(self.model, job.method)
            if self._prefixes is not None:
                cache, job.reused = self._prefixes.find(job, cache)
                job.read = job.reused
        cache.expect(len(job.ids) - job.read, question_follows=job.question_follows)
        return cache

    def _begin(self, job: Job, logits: Tensor) -> None:
        """The prompt has been read: every answer gets its first token and joins the others."""
        assert job.cache is not None
        for choice in range(job.n):
            cache = job.cache if choice == job.n - 1 else job.cache.fork()
            if job.counts_reads:
                cache.watch_reads()
            sampler = Sampler(job.sampling, choice)
            text = TextStream(self.tokenizer, job.stops)
            row = Row(job, choice, cache, sampler, text)
            job.rows.append(row)
            self._rows.append(row)
            self._batch.join(cache)
        for row in list(job.rows):
            self._take(row, logits)

    def _generate(self) -> None:
        """The next token of every answer in hand, in one pass."""
        rows = list(self._rows)
        if not rows:
            return
        try:
            logits = self._forward(**self._batch.inputs([[row.token] for row in rows], self.model.device))
            self.steps += 1
        except Exception as error:
            self._fail([row.job for row in rows], error)
            return
        for row, own in zip(rows, logits, strict=True):
            self._take(row, own)

    def _take(self, row: Row, logits: Tensor) -> None:
        """The row's next token; what fails here ends its job alone."""
        try:
            self._choose(row, logits)
        except Exception as error:
            self._fail([row.job], error)

    def _choose(self, row: Row, logits: Tensor) -> None:
        """Chooses the token that follows, and gives out the text that is certain by now."""
        job = row.job
        if row not in self._rows:
            return
        try:
            chosen = row.sampler.choose(logits)
        except FloatingPointError:
            raise NotFiniteError(
                f"{type(self.model).__name__} gave NaN or infinite logits; check its weights and its dtype."
            ) from None
        row.token = chosen.token
        row.tokens += 1
        self.generated += 1
        self.metrics.generated_tokens.inc()
        if job.first_token is None:
            job.first_token = self.metrics.first(job.arrived)
        text = ""
        if chosen.token in self.ends:
            row.reason = "stop"
        else:
            text = row.text.put(chosen.token)
            row.reason = "stop" if row.text.stopped else "length" if row.tokens >= job.max_tokens else None
        if row.reason is not None:
            text += row.text.end()
        job.emit(Piece(row.choice, text, chosen, row.reason))
        if row.reason is not None:
            self._leave(row)
            if all(other.reason is not None for other in job.rows):
                job.emit(Done(self._usage(job, row.cache, sum(other.tokens for other in job.rows))))
                job.rows.clear()

    def _leave(self, row: Row) -> None:
        self._rows.remove(row)
        self._batch.leave(row.cache)

    def _forward(self, **inputs: Any) -> Tensor:
        """Logits [b, vocabulary] of the last column."""
        logits: Tensor = self.model(**inputs, logits_to_keep=1).logits[:, -1]
        return logits

    def _usage(self, job: Job, cache: Cache, generated: int) -> Usage:
        report = cache.report()
        self.metrics.nbytes.set(sum(row.cache.nbytes() for row in self._rows) + report.nbytes)
        self.metrics.peak.set(max(self.metrics.peak_bytes, report.peak_nbytes))
        reused = job.prefix_tokens + job.reused
        self.metrics.reused_tokens.inc(reused)
        read = max(layer.tokens_read for layer in report.layers)
        self.metrics.tokens_read.observe(read)
        return Usage(
            method=report.method,
            prompt_tokens=job.prompt_tokens,
            completion_tokens=generated,
            reused_tokens=reused,
            nbytes=report.nbytes,
            tokens_seen=max(layer.tokens_seen for layer in report.layers),
            tokens_held=max(layer.tokens_held for layer in report.layers),
            tokens_read=read,
            shares=tuple(cache.reads()[: job.prompt_tokens].tolist()) if job.counts_reads else (),
        )

    def _fail(self, jobs: Iterable[Job], error: Exception) -> None:
        """Ends jobs that cannot go on. Each is told why; the others do not notice."""
        log.error("a request failed", exc_info=error)
        for job in dict.fromkeys(jobs):
            for row in [row for row in self._rows if row.job is job]:
                self._leave(row)
            if job in self._reading:
                self._reading.remove(job)
            job.rows.clear()
            job.emit(Done(error=error))
