"""A request on its way through the engine."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvote import Cache, Method
from kvote.serve.sampling import Chosen, Sampler, Sampling
from kvote.serve.text import TextStream


@dataclass(frozen=True)
class Usage:
    """The resources that a request took. ``nbytes`` and the counts of tokens are those at its end, of the layer that
    has most. ``shares``: how often each token of the prompt was read, where that was counted."""

    method: str
    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int
    nbytes: int
    tokens_seen: int
    tokens_held: int
    tokens_read: int
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class Piece:
    """More of answer ``choice``: text, and the token it came with. ``reason``: why the answer has ended."""

    choice: int
    text: str
    chosen: Chosen | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Done:
    """Nothing more will come. ``error`` says what went wrong."""

    usage: Usage | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Job:
    """``ids``: the tokens to read, behind those that ``prefix`` holds. ``owner``: a digest of the key that it came
    with. ``emit`` is called from the engine's thread. With ``max_tokens`` 0 the text is only read, and ``cache`` is
    what became of it."""

    ids: Sequence[int]
    method: Method
    sampling: Sampling
    emit: Callable[[Piece | Done], None]
    max_tokens: int = 16
    n: int = 1
    stops: Sequence[str] = ()
    prefix: Cache | None = None
    prefix_tokens: int = 0
    question_follows: bool = False
    counts_reads: bool = False
    owner: str = ""
    foreseen: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    arrived: float = field(default_factory=time.perf_counter)
    # The engine's own.
    cache: Cache | None = None
    read: int = 0
    # Of ``ids``, those that had been read for an earlier request; and the seconds that it takes to read them all.
    reused: int = 0
    reading_seconds: float = 0.0
    rows: "list[Row]" = field(default_factory=list)
    first_token: float | None = None

    @property
    def prompt_tokens(self) -> int:
        return self.prefix_tokens + len(self.ids)


@dataclass(eq=False)
class Row:
    """One answer that is being generated: ``token`` is the one to go in next."""

    job: Job
    choice: int
    cache: Cache
    sampler: Sampler
    text: TextStream
    token: int = 0
    tokens: int = 0
    reason: str | None = None
