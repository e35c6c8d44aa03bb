"""TokenSet: what a block of queries reads. The only thing that readers produce and segments consume."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from torch import Tensor

from kvote.beside import Beside

if TYPE_CHECKING:
    from kvote.index.column import Index
    from kvote.rope import Rope
    from kvote.store.segment import Logits, Segment

Positions = Literal["original", "contiguous", "together"]


@dataclass(frozen=True)
class TokenSet:
    """Tokens, and where they stand for the queries that read them.

    ``index``: slots within the lane, ascending; int64 [b, q, m] for q blocks of queries of equal size, [b, heads, q, m]
    where every query head has a list of its own, or a range of neighbours that all queries share. ``causal``: the last
    rows of the list are the queries themselves, row i of r sees list entries up to m - r + i, and with ``window`` only
    the last ``window`` of those. ``positions``: the tokens' own, or 0 .. m - 1 in list order with the queries at the
    end of the list, or all at ``query_at``; or all tokens together at 0, and all queries at ``query_at``.
    """

    index: Tensor | range
    causal: bool = True
    window: int | None = None
    positions: Positions = "original"
    query_at: int | None = None

    @property
    def blocks(self) -> int:
        return 1 if isinstance(self.index, range) else self.index.shape[-2]

    @property
    def by_head(self) -> bool:
        """Whether query heads read different tokens."""
        return isinstance(self.index, Tensor) and self.index.dim() == 4

    def of_rows(self, count: int, start: int, stop: int) -> "TokenSet":
        """What query rows ``start`` to ``stop`` read, where this is what ``count`` rows read."""
        if isinstance(self.index, Tensor) and self.blocks == count:
            return replace(self, index=self.index[..., start:stop, :])
        if self.blocks > 1:
            raise ValueError("Blocks of several rows cannot be cut.")
        if not self.causal or stop == count:
            return self
        seen = len(self) - (count - stop)
        index = self.index[:seen] if isinstance(self.index, range) else self.index[..., :seen]
        return replace(self, index=index)

    def __len__(self) -> int:
        """Tokens that each query reads."""
        return len(self.index) if isinstance(self.index, range) else self.index.shape[-1]


@dataclass(frozen=True)
class Unread:
    """What stands for the tokens that queries do not read: ``value`` [b, heads, t, dv], and the logarithm ``beyond``
    [b, heads, t] of their softmax mass, as a multiple of the mass of the tokens that are read."""

    value: Tensor
    beyond: Tensor

    def beside(self, out: Tensor, lse: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Both answers, to be merged: that of the tokens read, with its log-sum-exp, and this."""
        return [(out, lse), (self.value, lse + self.beyond)]


@dataclass(frozen=True)
class Span:
    """Query rows ``start`` to ``stop`` of a forward pass, the disjoint token sets that they read, and what stands for
    the others, if anything does."""

    start: int
    stop: int
    reads: list[TokenSet]
    unread: Unread | None = None

    def in_place(self, length: int) -> "Span":
        """The same with tokens at their own positions, if they are all ``length`` that are held: where some rows of a
        batch are padded on the right, a model gives what comes behind the padding positions that it has had before."""
        read = self.reads[0]
        whole = len(self.reads) == 1 and isinstance(read.index, range) and read.index == range(length)
        if not whole or (read.window is not None and read.window < length):
            return self
        return replace(self, reads=[replace(read, positions="original", query_at=None)])


@dataclass(frozen=True)
class Queries:
    """Query rows [b, heads, t, d]: rotated by the model, and at position 0 where a reader or a store needs that."""

    rotated: Tensor
    raw: Tensor | None = None

    def rows(self, start: int, stop: int) -> "Queries":
        if start == 0 and stop == self.rotated.shape[2]:
            return self
        raw = None if self.raw is None else self.raw[:, :, start:stop]
        return Queries(self.rotated[:, :, start:stop], raw)


class Token(NamedTuple):
    """A generated token of the only sequence: ``query`` [1, heads, 1, d], ``key`` [1, h, 1, d] and ``value``
    [1, h, 1, dv] as the model made them, its ``position``, and what is done to the products before the softmax."""

    query: Tensor
    key: Tensor
    value: Tensor
    position: int
    logits: "Logits"


@dataclass
class Activity:
    """What a layer did, for ``cache.report()`` and for tests that ask whether a method really acted. What a GPU decides
    by itself is counted there too, in tensors that nobody looks at before the report."""

    calls: int = 0
    selections: int | Tensor = 0
    reused: int | Tensor = 0
    tokens_read: int = 0
    dropped: int = 0


@dataclass
class Reading:
    """All that a reader may look at for one group of equally long sequences in one forward pass.

    The queries' own tokens are already in the segment: query row i is slot ``first + i``. The last ``solo`` rows end
    a prompt or a turn; ``decode`` marks a single generated token. ``memories``: what the reader remembers of each layer
    of the cache, of which this is ``number``; those before it have already read for the same tokens; empty
    unless the reader ``crosses_layers``. ``logits``: what the model does to q.k before the softmax; None: nothing.
    ``beside``: token ids and hidden states of the query rows, where the reader's ``beside`` names them.
    ``recording``: a caller may still roll this pass back. ``answered`` [b, heads, r]: once a span was read, the
    log-sum-exp of all that its queries read.
    """

    queries: Queries
    segment: "Segment"
    rows: list[int]
    first: int
    solo: int
    decode: bool
    layer: int
    sequences: int
    rope: "Rope | None"
    activity: Activity
    memory: "Memory | None" = None
    memories: "Sequence[Memory | None]" = ()
    number: int = 0
    logits: "Logits | None" = None
    beside: Beside | None = None
    recording: bool = False
    answered: Tensor | None = None

    def scaled(self, scores: Tensor) -> Tensor:
        """Products q.k as they enter the softmax."""
        if self.logits is None:
            return scores
        scaled, cap = scores * self.logits.scale, self.logits.softcap
        return scaled if cap is None else cap * (scaled / cap).tanh()

    def of(self, rows: list[int]) -> "Reading":
        """The same for some of the sequences only."""
        return replace(self, rows=rows)

    @property
    def count(self) -> int:
        return self.queries.rotated.shape[2]


class Memory(Protocol):
    """What a reader remembers between decode steps, per sequence."""

    def select(self, index: list[int]) -> None: ...
    def forget(self) -> None: ...
    def mark(self) -> Any:
        """What ``restore`` needs when a pass is interrupted. Cheap."""
        ...

    def restore(self, mark: Any) -> None: ...
    @property
    def nbytes(self) -> int: ...


class AddsUp(Memory, Protocol):
    """A memory that adds up what passes showed it."""

    def take_back(self, segment: "Segment", lengths: list[int]) -> None:
        """Forgets what it was shown of the tokens behind ``lengths``, of passes while a caller was ``recording``; what
        is left cannot be taken back any more."""
        ...


class Reader(Protocol):
    """Decides which tokens a query reads. ``needs_raw_keys``: keys must be stored at position 0. ``indexes``:
    the columns derived from keys that it scores with. ``tail``: the last tokens of a prompt that it treats one by one.
    ``one_list``: all heads read the same slots, because they agreed on them, so these must be the same
    tokens in every head. ``lists``: whether it picks single tokens. ``crosses_layers``: whether it reads in one layer
    what it picked in another, so all layers must hold the same tokens. ``needs_plain_keys``: it scores keys as the
    model rotated them. ``pairs_by_layer``: which key head a query head belongs to follows from their places in the
    whole layer. ``grain``: what its queries read in a prompt, in front of the tail, does not depend on what follows the
    next multiple of so many tokens; None: it may. A reader that has ``adds_up`` remembers sums over passes, so its
    memory is an ``AddsUp``; one that has ``alone`` is given generated tokens of a batch row by row."""

    @property
    def one_list(self) -> bool: ...
    @property
    def lists(self) -> bool: ...
    @property
    def crosses_layers(self) -> bool: ...
    @property
    def needs_raw_keys(self) -> bool: ...
    @property
    def needs_plain_keys(self) -> bool: ...
    @property
    def pairs_by_layer(self) -> bool: ...
    @property
    def indexes(self) -> "tuple[Index, ...]": ...
    @property
    def tail(self) -> int: ...
    @property
    def grain(self) -> int | None: ...
    def check(self, layers: int) -> None:
        """Raises MethodError if it cannot serve so many layers with full attention."""
        ...

    def new_memory(self) -> Memory | None: ...
    def read(self, reading: Reading) -> Iterator[Span]: ...


class PlainReader:
    """What a reader is unless it says otherwise: it remembers nothing, and takes keys as the model rotated them."""

    @property
    def one_list(self) -> bool:
        return False

    @property
    def lists(self) -> bool:
        return False

    @property
    def crosses_layers(self) -> bool:
        return False

    @property
    def needs_raw_keys(self) -> bool:
        return False

    @property
    def needs_plain_keys(self) -> bool:
        return False

    @property
    def pairs_by_layer(self) -> bool:
        return False

    @property
    def indexes(self) -> "tuple[Index, ...]":
        return ()

    @property
    def tail(self) -> int:
        return 0

    @property
    def grain(self) -> int | None:
        return None

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
class Everything(PlainReader):
    """Reads all tokens held, at their own positions: dense attention."""

    # Whether key heads may hold different numbers of tokens.
    uneven: bool = True

    @property
    def grain(self) -> int | None:
        return 1

    def step(
        self, token: Token, segment: Any, rope: "Rope | None", memory: "Memory | None", activity: Activity
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
