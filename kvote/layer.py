"""One layer's life: append the new tokens, read, attend, settle what stays. Knows no transformers and no paper."""

from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from kvote.attend import attend_spans, slotless_answers
from kvote.byte_budget import check_budget
from kvote.errors import InputError
from kvote.inference import outside_inference
from kvote.keep.observation import Observation
from kvote.keep.policies import KeepAll
from kvote.keep.record import Record
from kvote.layer_stack import LayerStack as LayerStack
from kvote.layer_state import LayerState
from kvote.padding import drop_padded, note_padding
from kvote.passes import Checkpoint, not_read_again
from kvote.read.reader import Activity, Everything, Reading, Token
from kvote.rollback import check_crop, checkpoint_of, crop, forget_shown, restore
from kvote.row_groups import RowGroup, answer_pads, one_by_one, rows_alike
from kvote.settling import finish
from kvote.step import Step as Step
from kvote.store.pages import PAGE
from kvote.store.segment import ByLayer, Indexed, Segment
from kvote.store.uncompressed import UncompressedSegment
from kvote.store.uneven import UnevenSegment
from kvote.tokens import Queries


@dataclass
class Layer(LayerState):
    """The tokens of one model layer (or of some of its key heads) under one method. Sequences are rows; padding never
    becomes a token."""

    # All layers of the cache in their order, this one among them, for what spans layers.
    stack: "LayerStack[Layer]" = field(default_factory=LayerStack, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._hears = self.method.keep.needs.repeat_chunk > 0
        self._looks_across = self.method.read.needs.other_layers

    @property
    def parts(self) -> "list[Layer]":
        """The layers that hold its tokens: itself."""
        return [self]

    def start(self, step: Step) -> Segment:
        """Creates the storage at the first pass, when shapes, dtype and batch size are known."""
        if self.segment is None:
            heads, value_dim, store = step.key.shape[1], step.value.shape[3], self.method.store
            store = store.of_layer(self.index) if isinstance(store, ByLayer) else store
            self.segment = store.new_segment(heads, step.key, value_dim, self.step_rope)
            self.segment.add_sequences(step.key.shape[0])
            if isinstance(self.segment, Indexed) and self.method.store.offers.as_made:
                for index in self.method.read.needs.indexes:
                    self.segment.add_index(index, self.index)
            self.memory = self.method.read.new_memory()
            self.record.memory = self.method.keep.new_memory()
            self.reserve()
            check_budget(self)
            # What a class inherits may not hold for what it changes.
            offered = "step" in vars(type(self.method.read)) and isinstance(self.segment, UncompressedSegment)
            self.one_call_step = offered and type(self.method.keep) is KeepAll and not self.method.needs.extra_inputs
        return self.segment

    def expect(self, tokens: int) -> None:
        """Announces ``tokens`` columns."""
        self.expected = tokens
        # Where layers share a budget, only the one at work holds a whole prompt.
        if not self.keeps.cascades:
            self.reserve()

    @outside_inference
    def reserve(self) -> None:
        """Sets memory aside for the tokens expected, unless the method drops most of them on the way."""
        if self.segment is not None and self.expected and (self.keeps.waits or not self.keeps.drops):
            self.segment.reserve(self.expected)
            self.expected = 0

    def attend(self, step: Step) -> Tensor:
        """The attention output [b, t, heads, dv] of new tokens that are kept, stored and read as the method says.

        Raises InputError if the batch size changed. Interrupted, the layer is as before, or the cache refuses to go on.
        """
        return self.passes.whole([self], self.run, step)

    def checkpoint(self) -> Checkpoint:
        return checkpoint_of(self)

    def restore(self, checkpoint: Checkpoint) -> bool:
        """Forgets what a pass has added since ``checkpoint``; False if it has dropped or encoded something."""
        return restore(self, checkpoint)

    @outside_inference
    def run(self, step: Step) -> Tensor:
        """Does what ``attend`` does, for a caller that handles interruptions."""
        segment, again = self.start(step), self.passes.repeats
        if self._hears and again is None and self.method.keep.due(self.record.memory):
            raise not_read_again(self.method.spec)
        if self.expected:
            self.reserve()
        if self.one_call_step and step.decode and self.reads is None:
            answer = self._step(step)
            if answer is not None:
                return answer
        self.activity.calls += 1
        b, heads, t, _ = step.query.shape
        if b != self.sequences:
            raise InputError(f"This cache holds {self.sequences} sequences, but the batch has {b}; reset the cache.")
        if step.past is not None or self.columns is not None:
            drop_padded(self, step.past)
        note_padding(self, step.valid, b, t)
        held_key, unrotated_query = step.key, None
        rope = self.step_rope
        if rope is not None:
            angles = rope.angles(step.positions, step.key.dtype)
            held_key, unrotated_query = rope.undo(step.key, angles), rope.undo(step.query, angles)
        queries = Queries(step.query, unrotated_query)
        before = [] if b == 1 and step.valid is None else [segment.length(row) for row in range(b)]
        row_groups = rows_alike(before, step.valid, t)
        if len(row_groups) > 1 and self._joins(row_groups, step):
            row_groups = [(list(range(b)), None)]
        if self.method.read.offers.alone if step.decode else self.method.read.offers.apart:
            row_groups = one_by_one(row_groups)
        out = None
        for rows, columns in row_groups:
            block = RowGroup(rows, columns, b)
            first, extra_inputs = max(map(segment.length, rows)), block.extra_inputs(step.extra_inputs)
            segment.append(rows, block.cut(held_key), block.cut(step.value), block.cut(step.positions[:, None])[:, 0])
            reading = Reading(
                queries=Queries(
                    block.cut(queries.rotated), None if unrotated_query is None else block.cut(unrotated_query)
                ),
                segment=segment,
                rows=rows,
                first=first,
                tail_queries=min(step.tail_queries, max(map(segment.length, rows)) - first),
                decode=step.decode,
                layer=self.index,
                sequences=b,
                rope=rope,
                activity=self.activity,
                memory=self.memory,
                memories=[layer.memory for layer in self.stack.layers] if self._looks_across else (),
                number=self.number,
                scaling=step.scaling,
                extra_inputs=None if extra_inputs is None else extra_inputs.observed,
                recording=self.record_past,
                prompt_left=step.prompt_left,
            )
            answer, lse, spans = attend_spans(self, reading, step)
            segment.observe_queries(reading.queries, rows, step.prompt_left, extra_inputs)
            if again is not None or self.method.keep.observes(step.prompt_left):
                parts = (reading.queries, lse, segment, rows, first, spans, step.scaling, step.prompt_left)
                seen = Observation(*parts, self.rope, again, self.index, reading.extra_inputs)
                if again is None:
                    self.record.waiting.append(seen)
                else:
                    # It is about tokens that stay, by queries that will be gone.
                    self.method.keep.observe(seen, self.record.memory)
            if block.is_everything:
                out = answer
                break
            if out is None:
                out = answer.new_zeros(b, heads, t, answer.shape[3])
            block.put(out, answer)
        out = step.query.new_zeros(b, heads, t, step.value.shape[3]) if out is None else out
        if step.valid is not None:
            slotless = partial(slotless_answers, self, scaling=step.scaling)
            self.right_padded |= answer_pads(out, step, segment, before, slotless)
        self.seen += t
        self.prompt_left = max(0, step.prompt_left or 0)
        self.prompted |= step.prompt_left is not None
        # Counting costs as much as a short decode step, and pages come by the dozen.
        counts = t > 1 or self.seen % PAGE == 0
        if counts:
            self.count()
        if not self.record_past:
            finish(self)
            if counts:
                for layer in self.stack.layers if self.method.spans_layers else [self]:
                    layer.count()
        return out.transpose(1, 2)

    def _joins(self, row_groups: list[tuple[list[int], Tensor | None]], step: Step) -> bool:
        """Whether rows of different length are answered in one call: each adds a generated token, and reads all that it
        holds."""
        whole = (
            all(columns is None for _, columns in row_groups)
            and sum(len(rows) for rows, _ in row_groups) == self.sequences
        )
        return (
            whole
            and step.decode
            and self.passes.repeats is None
            and type(self.method.read) is Everything
            and isinstance(self.segment, UnevenSegment)
            and self.segment.joins(step.query.shape[1])
            and not self.method.keep.observes(step.prompt_left)
        )

    def _step(self, step: Step) -> Tensor | None:
        """As ``run`` for one generated token of one sequence, in one call of reader and segment: nothing is dropped,
        encoded or padded. None, and nothing has changed, where that cannot be."""
        if (
            step.valid is not None
            or step.past is not None
            or step.prompt_left is not None
            or step.sink_logits is not None
        ):
            return None
        if self.columns is not None or self.right_padded or step.query.shape[0] != 1 or self.sequences != 1:
            return None
        token = Token(step.query, step.key, step.value, int(step.positions), step.scaling)
        answer = self.method.read.step(token, self.segment, self.step_rope, self.memory, self.activity)  # type: ignore[attr-defined]
        if answer is None:
            return None
        self.activity.calls += 1
        self.seen += 1
        self.prompt_left = 0
        if self.seen % PAGE == 0:
            self.count()
        out: Tensor = answer.to(step.query.dtype)
        return out

    def check_crop(self, columns: int) -> None:
        """Raises CropError if the last ``columns`` columns cannot be forgotten: if that needs tokens back that are
        dropped."""
        check_crop(self, columns)

    def crop(self, columns: int, prompt_left: int | None = None) -> None:
        """Forgets the last ``columns`` columns. ``prompt_left``: what follows is the rest of the same announced prompt,
        of which so many tokens are to come; None: it is another. Raises CropError as ``check_crop``."""
        crop(self, columns, prompt_left)

    def forget_shown(self, columns: int) -> None:
        """Forgets the last ``columns`` columns, which were recorded as what may be rolled back, once the keeper has
        been shown them: they decide what stays of the rest."""
        forget_shown(self, columns)

    @outside_inference
    def select(self, index: list[int]) -> None:
        """Makes sequence i a copy of the former sequence ``index[i]`` (beams, several answers, a part of the batch)."""
        if self.segment is None or index == list(range(self.sequences)):
            return
        self.segment.select(index)
        self.record.select(index)
        if self.columns is not None:
            self.columns = self.columns[index]
        if self.memory is not None:
            self.memory.select(index)
        self.segment.trim()

    def reset(self) -> None:
        """Back to the state before the first token."""
        self.segment, self.columns, self.memory = None, None, None
        self.record = Record(self.method.keep)
        self.passes.hold(-self.counted)
        self.counted = 0
        self.seen = self.settled = self.encoded = self.shown = self.expected = self.prompt_left = 0
        self.record_past = self.prompted = self.right_padded = False
        self.activity = Activity()
