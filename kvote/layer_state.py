"""The state of one layer: tokens, memory and counts, for all that works on it."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvote.keep.record import Record
from kvote.layer_stack import LayerStack
from kvote.method import Method
from kvote.passes import Passes
from kvote.read.reader import Activity, Memory
from kvote.read_counts import ReadCounts
from kvote.rope import Rope
from kvote.store.segment import Segment
from kvote.store.uneven import UnevenSegment


@dataclass
class LayerState:
    """The tokens of one model layer, or of some of its key heads, and what is known of them. Sequences are rows."""

    index: int
    method: Method
    rope: Rope | None
    # Layers of this size that share a budget of bytes.
    layers: float = 1
    # All layers of the cache in their order, this one among them, for what spans layers.
    stack: LayerStack[Any] = field(default_factory=LayerStack, repr=False)
    # Whether other key heads of its layer or of others drop tokens, so that no token may be taken out here either.
    others_drop: bool = False
    # All layers of the cache, and all groups of their heads, share one.
    passes: Passes = field(default_factory=Passes)
    segment: Segment | None = None
    columns: Tensor | None = None
    seen: int = 0
    memory: Memory | None = None
    activity: Activity = field(default_factory=Activity)
    # While a caller may still roll back (assisted decoding), nothing is dropped until it crops.
    record_past: bool = False
    # Columns seen when tokens were last dropped: no rollback goes back further.
    settled: int = 0
    # Columns seen when something was last encoded. A rollback behind that gives back what was encoded as it decodes.
    encoded: int = 0
    # Columns seen when the keeper was last shown a pass.
    shown: int = 0
    # Tokens announced but not yet seen; memory for them is set aside in one piece.
    expected: int = 0
    # Tokens of an announced prompt still to come.
    prompt_left: int = 0
    # Whether tokens of a prompt came since the keeper was last asked.
    prompted: bool = False
    # Whether padding ever stood behind tokens, so that positions may not count the tokens of a row.
    right_padded: bool = False
    # How often something was dropped, encoded or shown to a keeper, which no checkpoint can take back.
    changes: int = 0
    # Bytes held when they were last counted.
    counted: int = 0
    # Whether a generated token may be stored and answered in one call of the reader.
    one_call_step: bool = False
    # Counts of what generated tokens read; None unless asked for.
    reads: ReadCounts | None = field(default=None, repr=False)
    record: Record = field(init=False)

    def __post_init__(self) -> None:
        self.record = Record(self.method.keep)
        # What the parts of the method say of themselves is asked once.
        self.keeps = self.method.keep.offers
        self.step_rope = self.rope if self.method.unrotated else None
        self.shares_layers = self.method.store.offers.shares_layers
        self.number = self.stack.add(self)

    @property
    def sequences(self) -> int:
        return 0 if self.segment is None else self.segment.sequences

    @property
    def held(self) -> int:
        """Tokens held, of all sequences together."""
        return 0 if self.segment is None else sum(self.held_of(row) for row in range(self.sequences))

    def held_of(self, row: int) -> int:
        """Tokens of a sequence, the mean of its key heads where they differ."""
        assert self.segment is not None
        if isinstance(self.segment, UnevenSegment) and self.segment.by_head:
            return -(-sum(self.segment.lengths(row)) // self.segment.heads)
        return self.segment.length(row)

    @property
    def nbytes(self) -> int:
        parts = [self.segment, self.memory, self.record]
        columns = 0 if self.columns is None else self.columns.untyped_storage().nbytes()
        return columns + sum(part.nbytes for part in parts if part is not None)

    def positions(self, row: int) -> list[Tensor]:
        """Original positions of the tokens held, one int32 tensor per key head."""
        return [] if self.segment is None else self.segment.positions(row)

    def tokens_seen(self, row: int) -> int:
        """Tokens of a sequence that have come, also those that were dropped."""
        return self.seen if self.columns is None else int(self.columns[row].sum())

    def count(self) -> None:
        """Counts the bytes held, for ``Passes.peak``."""
        before, self.counted = self.counted, self.nbytes - self.record.waiting_nbytes
        self.passes.hold(self.counted - before)
