"""From typed requests to jobs, and from what the engine emits to answers."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvote import Cache, KvoteError, Method
from kvote.calibration.file import no_files
from kvote.serve.documents import Documents, StoredDocument
from kvote.serve.engine import Engine, Limits
from kvote.serve.errors import ApiError, told
from kvote.serve.job import Done, Job, Piece, Usage
from kvote.serve.metrics import Metrics
from kvote.serve.prefixes import Prefixes
from kvote.serve.prompts import behind_document, chat_text, document_text, ids_of
from kvote.serve.sampling import Sampling
from kvote.serve.schema import ChatRequest, CompletionRequest, Decoded, Message, ResponsesRequest, Sampled
from kvote.spec import parse

# Pieces of a prompt, at most, in which is told what was read.
_PIECES = 4_000
# Methods that need not be tried anew for every request.
_SPECS = 256


@dataclass
class Answer:
    """One choice, whole."""

    text: str = ""
    reason: str = "stop"
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class Service:
    """A model behind an engine. ``method`` is used where a request names none."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    method: str = "dense"
    limits: Limits = field(default_factory=Limits)
    documents: Documents = field(default_factory=lambda: Documents(2**32, 100))
    keys: Sequence[str] = ()
    # Where prompts that begin alike share what was read; None: nowhere.
    prefixes: Prefixes | None = None

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        # Whoever is refused is refused now, not in the first request.
        self._default = self._checked(self.method)
        self._allowed = lru_cache(_SPECS)(self._checked)
        self.engine = Engine(self.model, self.tokenizer, self.limits, self.metrics, self.prefixes)
        self.known = self.model.get_input_embeddings().weight.shape[0]

    def _checked(self, spec: str) -> Method:
        method = parse(spec)
        Cache(self.model, method)
        return method

    def method_of(self, spec: str | None) -> Method:
        """Raises ApiError for a policy that is none, that names files, or that this model does not allow."""
        if spec is None:
            return self._default
        try:
            # No file of the server is opened for a client.
            with no_files():
                return self._allowed(spec)
        except KvoteError as error:
            raise ApiError(400, str(error), param="kv_method", code="invalid_kv_method") from None

    def check_model(self, name: str) -> None:
        """Raises ApiError for a model that is not this one."""
        if name != self.name:
            raise ApiError(
                404,
                f"There is no model {name[:80]!r} here; it is {self.name!r}.",
                param="model",
                code="model_not_found",
            )

    # Jobs.

    def chat(self, request: ChatRequest, owner: str) -> "Running":
        self.check_model(request.model)
        tools = None if request.tool_choice == "none" else request.tools
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        most = request.max_completion_tokens or request.max_tokens
        return self._converse(request, request.messages, owner, most, logprobs, tools=tools)

    def respond(self, request: ResponsesRequest, owner: str) -> "Running":
        self.check_model(request.model)
        told = request.input
        messages = [Message(role="user", content=told)] if isinstance(told, str) else list(told)
        if request.instructions is not None:
            messages.insert(0, Message(role="system", content=request.instructions))
        if not messages:
            raise ApiError(400, "There is no input; ask something.", param="input")
        return self._converse(request, messages, owner, request.max_output_tokens, None)

    def _converse(
        self,
        request: Sampled,
        messages: Sequence[Message],
        owner: str,
        most: int | None,
        logprobs: int | None,
        tools: Any = None,
    ) -> "Running":
        if request.document is None:
            text = chat_text(self.tokenizer, messages, tools)
            begins = not self.tokenizer.chat_template
            return self._run(request, [self._ids(text, begins)], owner, most, logprobs)
        document = self._asked(request.document, owner)
        if tools:
            raise ApiError(400, "Tools cannot be told of behind a document; leave one of them out.", param="tools")
        if request.kv_method is not None and request.kv_method != document.method:
            raise ApiError(
                400,
                f"The document was read with {document.method}; leave kv_method out, or send the document anew.",
                param="kv_method",
            )
        behind = behind_document(self.tokenizer, document.text, document.system, document.read, messages)
        return self._run(request, [self._ids(behind, False)], owner, most, logprobs, document)

    def complete(self, request: CompletionRequest, owner: str) -> "Running":
        self.check_model(request.model)
        prompt: Any = request.prompt
        single = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
        prompts: list[list[int]] = []
        for one in [prompt] if single else prompt:
            ids = self._ids(one, True) if isinstance(one, str) else list(one)
            if any(token >= self.known for token in ids):
                raise ApiError(400, f"There is no token above {self.known - 1:,}.", param="prompt")
            prompts.append(ids)
        if not prompts or len(prompts) > 64:
            raise ApiError(400, "Give 1 to 64 prompts.", param="prompt")
        document = None if request.document is None else self._asked(request.document, owner)
        return self._run(request, prompts, owner, request.max_tokens or 16, request.logprobs, document)

    def _asked(self, name: str, owner: str) -> StoredDocument:
        try:
            return self.documents.get(name, owner)
        except ApiError as error:
            raise ApiError(400, error.message, param="document", code=error.code) from None

    def _ids(self, text: str, begins: bool) -> list[int]:
        return ids_of(self.tokenizer, text, begins=begins, known=self.known)

    def _run(
        self,
        request: Sampled,
        prompts: list[list[int]],
        owner: str,
        most: int | None,
        logprobs: int | None,
        document: StoredDocument | None = None,
    ) -> "Running":
        if not all(prompts):
            raise ApiError(400, "The prompt is empty; ask something.", param="prompt")
        method = document.cache.method if document else self.method_of(request.kv_method)
        decoded = request if isinstance(request, Decoded) else None
        sampling, prefix_tokens = self._sampling(request, logprobs), document.tokens if document else 0
        running = Running(self.engine)
        for ids in prompts:
            room = self.limits.context - prefix_tokens - len(ids)
            running.add(
                Job(
                    ids=ids,
                    method=method,
                    sampling=sampling,
                    emit=running.emitter(),
                    max_tokens=max(1, min(room, 4_096)) if most is None else most,
                    n=decoded.n if decoded else 1,
                    stops=tuple(decoded.stop or ()) if decoded else (),
                    prefix=document.cache if document else None,
                    prefix_tokens=prefix_tokens,
                    counts_reads=request.kv_read,
                    owner=owner,
                )
            )
        if request.kv_read:
            running.told = [[*(document.ids if document else ()), *ids] for ids in prompts]
        return running

    def _sampling(self, request: Sampled, logprobs: int | None) -> Sampling:
        own = self.model.generation_config
        drawn = bool(getattr(own, "do_sample", False))
        decoded = request if isinstance(request, Decoded) else None
        bias = dict(decoded.logit_bias or {}) if decoded else {}
        if any(not 0 <= token < self.known for token in bias):
            raise ApiError(400, f"There is no token above {self.known - 1:,}.", param="logit_bias")
        temperature = request.temperature
        if temperature is None:
            temperature = float(getattr(own, "temperature", None) or 1.0) if drawn else 1.0
        top_p = request.top_p if request.top_p is not None else float((drawn and getattr(own, "top_p", None)) or 1.0)
        return Sampling(
            temperature=temperature,
            top_p=top_p,
            seed=decoded.seed if decoded else None,
            frequency_penalty=decoded.frequency_penalty if decoded else 0.0,
            presence_penalty=decoded.presence_penalty if decoded else 0.0,
            logit_bias=bias,
            logprobs=logprobs,
        )

    async def read_document(
        self, text: str, name: str, spec: str | None, system: str | None, owner: str
    ) -> StoredDocument:
        """Reads a text once and holds it. Raises ApiError for one that does not fit."""
        method = self.method_of(spec)
        if not text.strip():
            raise ApiError(400, "The document is empty.", param="text")
        read = document_text(self.tokenizer, text, system)
        ids = self._ids(read, not self.tokenizer.chat_template)
        running = Running(self.engine)
        job = Job(ids, method, Sampling(), running.emitter(), max_tokens=0, question_follows=True, owner=owner)
        running.add(job)
        async for _ in running.pieces():
            pass
        assert job.cache is not None
        document = StoredDocument(name, text, system, read, owner, method.spec, tuple(ids), job.cache)
        self.documents.add(document)
        self.metrics.documents.set(len(self.documents))
        self.metrics.document_bytes.set(self.documents.total)
        return document


class Running:
    """The jobs of one request, seen from the event loop. Whoever stops listening cancels them."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.jobs: list[Job] = []
        self.usages: list[Usage] = []
        # Tokens of the prompts, where it is told how often each was read.
        self.told: list[list[int]] = []
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece | Done]] = asyncio.Queue()

    def emitter(self) -> Any:
        number = len(self.jobs)

        def emit(event: Piece | Done) -> None:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (number, event))

        return emit

    def add(self, job: Job) -> None:
        """Hands a job to the engine. Raises ApiError, and cancels all jobs before it, if it does not take it."""
        self.jobs.append(job)
        try:
            self.engine.submit(job)
        except ApiError:
            self.cancel()
            raise

    def cancel(self) -> None:
        for job in self.jobs:
            self.engine.cancel(job)

    async def pieces(self) -> AsyncIterator[Piece]:
        """What the answers consist of, as it comes; answers of later prompts are numbered on. Raises ApiError."""
        left = len(self.jobs)
        try:
            while left:
                number, event = await self._queue.get()
                if isinstance(event, Piece):
                    choice = number * self.jobs[number].n + event.choice
                    yield Piece(choice, event.text, event.chosen, event.reason)
                    continue
                left -= 1
                if event.error is not None:
                    raise told(event.error)
                if event.usage is not None:
                    self.usages.append(event.usage)
        finally:
            if left:
                self.cancel()

    async def answers(self) -> list[Answer]:
        """All answers, whole."""
        answers = [Answer() for job in self.jobs for _ in range(job.n)]
        async for piece in self.pieces():
            answer = answers[piece.choice]
            answer.text += piece.text
            answer.pieces.append(piece)
            answer.reason = piece.reason or answer.reason
        return answers

    @property
    def usage(self) -> dict[str, Any]:
        """As OpenAI has it, and what the cache held and read in ``kv``."""
        prompt = sum(usage.prompt_tokens for usage in self.usages)
        generated = sum(usage.completion_tokens for usage in self.usages)
        reused = sum(usage.reused_tokens for usage in self.usages)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": reused},
            "kv": {
                "method": self.usages[0].method if self.usages else "",
                "bytes_held": sum(usage.nbytes for usage in self.usages),
                "tokens_seen": max((usage.tokens_seen for usage in self.usages), default=0),
                "tokens_held": max((usage.tokens_held for usage in self.usages), default=0),
                "tokens_read_per_step": max((usage.tokens_read for usage in self.usages), default=0),
                "prefix_tokens_reused": reused,
                **({"read": self._read} if self.told else {}),
            },
        }

    @property
    def _read(self) -> list[dict[str, Any]]:
        """The first prompt in pieces of a few tokens, and the share of queries that have read them."""
        ids, shares = self.told[0], self.usages[0].shares if self.usages else ()
        size, tokenizer = max(1, -(-len(ids) // _PIECES)), self.engine.tokenizer.backend_tokenizer
        stream, pieces = DecodeStream(skip_special_tokens=True), []
        for at in range(0, len(ids), size):
            text = "".join(stream.step(tokenizer, token) or "" for token in ids[at : at + size])
            own = shares[at : at + size]
            pieces.append({"text": text, "share": round(sum(own) / max(1, len(own)), 5)})
        return pieces
