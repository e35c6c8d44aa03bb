"""Reader: decides which tokens a query reads. What it may look at, and what it may remember."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from kvote.extra_inputs import ExtraInputs
from kvote.needs import ANYWHERE, NOTHING, Needs, ReaderOffers
from kvote.rope import Rope
from kvote.store.segment import Scaling, Segment
from kvote.tokens import Positions as Positions
from kvote.tokens import Queries as Queries
from kvote.tokens import Span as Span
from kvote.tokens import TokenSet as TokenSet
from kvote.tokens import Unread as Unread


class Token(NamedTuple):
    """A generated token of the only sequence: ``query`` [1, heads, 1, d], ``key`` [1, h, 1, d] and ``value``
    [1, h, 1, dv] as the model made them, its ``position``, and what is done to the products before the softmax."""

    query: Tensor
    key: Tensor
    value: Tensor
    position: int
    scaling: Scaling


@dataclass
class Activity:
    """Counts of what a layer did, for ``cache.report()`` and for tests that ask whether a method really acted. What a
    GPU decides by itself is counted in tensors, which are read when the report is made."""

    calls: int = 0
    selections: int | Tensor = 0
    reused: int | Tensor = 0
    tokens_read: int = 0
    dropped: int = 0


@dataclass
class Reading:
    """All that a reader may look at for one group of equally long sequences in one forward pass.

    The queries' own tokens are already in the segment: query row i is slot ``first + i``. The last ``tail_queries``
    rows end a prompt or a turn; ``decode`` marks a single generated token. ``memories``: what the reader remembers of
    each layer of the cache, of which this is ``number``; those before it have already read for the same tokens; empty
    unless the reader needs ``other_layers``. ``scaling``: what the model does to q.k before the softmax; None: nothing.
    ``extra_inputs``: token ids and hidden states of the query rows, where the reader's needs name them. ``recording``:
    a caller may still roll this pass back. ``prompt_left``: as in ``Step``. ``answered`` [b, heads, r]: once a span was
    read, the log-sum-exp of all that its queries read.
    """

    queries: Queries
    segment: Segment
    rows: list[int]
    first: int
    tail_queries: int
    decode: bool
    layer: int
    sequences: int
    rope: Rope | None
    activity: Activity
    memory: "Memory | None" = None
    memories: "Sequence[Memory | None]" = ()
    number: int = 0
    scaling: Scaling | None = None
    extra_inputs: ExtraInputs | None = None
    recording: bool = False
    prompt_left: int | None = 0
    answered: Tensor | None = None

    def scaled(self, scores: Tensor) -> Tensor:
        """Products q.k as they enter the softmax."""
        if self.scaling is None:
            return scores
        scaled, cap = scores * self.scaling.scale, self.scaling.softcap
        return scaled if cap is None else cap * (scaled / cap).tanh()

    def of(self, rows: list[int]) -> "Reading":
        """The same for some of the sequences only."""
        return replace(self, rows=rows)

    @property
    def count(self) -> int:
        return self.queries.rotated.shape[2]


class Memory(Protocol):
    """The memory of a reader between decode steps, per sequence."""

    def select(self, index: list[int]) -> None: ...
    def forget(self) -> None: ...
    def checkpoint(self) -> Any:
        """Makes the checkpoint that ``restore`` needs when a pass is interrupted. Cheap."""
        ...

    def restore(self, checkpoint: Any) -> None: ...
    @property
    def nbytes(self) -> int: ...


class AddsUp(Memory, Protocol):
    """A memory that adds up what passes showed it."""

    def take_back(self, segment: Segment, lengths: list[int]) -> None:
        """Forgets what it was shown of the tokens behind ``lengths``, of passes while a caller was ``recording``; what
        is left cannot be taken back any more."""
        ...


class Reader(Protocol):
    """Decides which tokens a query reads. ``tail``: the last tokens of a prompt that it treats one by one. ``needs``
    and ``offers``: as ``kvote.needs`` has them."""

    @property
    def tail(self) -> int: ...
    @property
    def needs(self) -> Needs: ...
    @property
    def offers(self) -> ReaderOffers: ...
    def check(self, layers: int) -> None:
        """Raises MethodError if it cannot serve so many layers with full attention."""
        ...

    def new_memory(self) -> Memory | None: ...
    def read(self, reading: Reading) -> Iterator[Span]: ...


class ReaderDefaults:
    """Defaults of readers: no memory, no needs."""

    @property
    def tail(self) -> int:
        return 0

    @property
    def needs(self) -> Needs:
        return NOTHING

    @property
    def offers(self) -> ReaderOffers:
        return ReaderOffers()

    def check(self, layers: int) -> None:
        pass

    def new_memory(self) -> Memory | None:
        return None


def everything(reading: Reading) -> Span:
    """All tokens held, at their own positions: dense attention."""
    first, stop = reading.first, reading.first + reading.count
    reading.activity.tokens_read = stop
    if reading.count == 1 or first == 0:
        return Span(0, reading.count, [TokenSet(range(stop), causal=reading.count > 1)])
    # Two answers merged by their log-sum-exp: neither part needs a mask of queries x tokens.
    return Span(0, reading.count, [TokenSet(range(first), causal=False), TokenSet(range(first, stop))])


@dataclass(frozen=True)
class Everything(ReaderDefaults):
    """Reads all tokens held, at their own positions: dense attention."""

    offers = ReaderOffers(uneven_heads=True, cuts=ANYWHERE)

    def step(
        self, token: Token, segment: Any, rope: Rope | None, memory: "Memory | None", activity: Activity
    ) -> Tensor | None:
        """Stores and answers a token in one call, as ``read`` and the segment would; None, and nothing has changed,
        where that cannot be. Readers need not have this."""
        if rope is not None:
            return None
        answer: tuple[Tensor, bool] | None = segment.step(token, None, None)
        if answer is None:
            return None
        activity.tokens_read = segment.length(0)
        return answer[0]

    def read(self, reading: Reading) -> Iterator[Span]:
        yield everything(reading)
