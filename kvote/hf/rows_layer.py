"""A layer of several caches in one batch: the layer of its own cache attends for each row."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from kvote.errors import InputError, UnsupportedModelError
from kvote.hf.cache_layer import CacheLayer, LayerHandoff
from kvote.hf.mask import Padding
from kvote.hf.rotary import RotaryPositions
from kvote.passes import Passes, whole_of_all
from kvote.step import Step
from kvote.store.segment import Scaling

# (query, key, value, mask) of one row -> what the model's native attention answers, [1, t, heads, dv]
NativeAttention = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


class Member(Protocol):
    """The parts of a cache in the batch that a layer needs."""

    layers: list[Any]
    passes: Passes

    def get_seq_length(self) -> int: ...


class AttentionInputs(NamedTuple):
    """The arguments of attention for a batch: ``query`` [b, heads, t, d], ``key`` [b, h, t, d], ``value`` [b, h, t,
    dv], ``positions`` [1 or b, t] or None where the model does not tell."""

    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor | None
    padding: Padding | None
    scaling: Scaling
    sinks: Tensor | None


class RowsLayer(LayerHandoff, CacheLayerMixin):
    """Layer ``index`` of the ``members``, one row of the batch each. ``sliding``: it is one of the model's own."""

    is_compileable = False
    supports_early_init = False

    def __init__(
        self,
        index: int,
        members: Sequence[Member],
        previous: "RowsLayer | None",
        *,
        sliding: bool,
        rotary: RotaryPositions | None = None,
    ) -> None:
        CacheLayerMixin.__init__(self)
        LayerHandoff.__init__(self, previous)
        self.index, self.members, self.is_sliding = index, members, sliding
        self.rotary = rotary

    @property
    def needs_positions(self) -> bool:
        """Whether some row's method has to know at which positions keys were rotated."""
        return not self.is_sliding and any(layer.needs_positions for layer in self._own)

    @property
    def _own(self) -> list[Any]:
        return [member.layers[self.index] for member in self.members]

    def attend(self, given: AttentionInputs, native: NativeAttention) -> Tensor:
        """The answers [b, t, heads, dv]; of columns that are no tokens, zeros. Whatever interrupts it, the layers of
        all members are as they were before, or their caches refuse to go on.

        Raises InputError for a batch that does not fit the members, or whose positions it cannot tell.
        """
        b, t = given.query.shape[0], given.query.shape[2]
        layers = self._own
        if b != len(layers):
            raise InputError(f"{len(layers)} caches have joined, but the batch has {b} rows; give one row to each.")
        spans = [(0, t)] * b if given.padding is None else given.padding.spans(b, t)
        self._check_positions(given.positions, spans)
        answer = self._slide if self.is_sliding else self._ask
        return answer(given, layers, spans, native)

    def _check_positions(self, positions: Tensor | None, spans: Sequence[tuple[int, int]]) -> None:
        """Raises InputError where the model has made up positions, one for all rows, which hold unlike texts."""
        lengths = {member.get_seq_length() for member in self.members} if self.previous is None else set()
        if positions is None or len(positions) == len(spans) > 1 or self.previous is not None:
            return
        if len(lengths) > 1 or len(set(spans)) > 1 or spans[0] != (0, spans[0][1]):
            raise InputError(
                "Rows of unlike caches stand at positions of their own; pass position_ids [rows, columns]."
            )

    def _ask(
        self,
        given: AttentionInputs,
        layers: list[CacheLayer],
        spans: Sequence[tuple[int, int]],
        native: NativeAttention,
    ) -> Tensor:
        """kvote's own layers answer."""
        scaling, sinks = given.scaling, given.sinks
        steps: list[Step | None] = []
        for row, (layer, (start, stop)) in enumerate(zip(layers, spans, strict=True)):
            if start == stop:
                steps.append(None)
                continue
            query, key, value, places = _row(given, row, start, stop)
            # Padding that the cache itself has seen, when it was alone.
            past = layer.layer.parts[0].columns
            steps.append(layer.step(query, key, value, places, scaling, sinks, past=past, columns=(start, stop)))

        def run() -> list[Tensor | None]:
            pairs = zip(layers, steps, strict=True)
            return [None if step is None else layer.layer.run(step) for layer, step in pairs]

        parts = [
            (member.passes, layer.layer.parts)
            for member, layer, step in zip(self.members, layers, steps, strict=True)
            if step is not None
        ]
        return _together(whole_of_all(parts, run), given, spans)

    def _slide(
        self, given: AttentionInputs, layers: list[Any], spans: Sequence[tuple[int, int]], native: NativeAttention
    ) -> Tensor:
        """The model's native layers answer, each over its own keys."""
        if given.padding is None:
            raise UnsupportedModelError("The model makes no mask for its sliding layers, which several caches need.")
        before = [dict(vars(layer)) for layer in layers]
        answers: list[Tensor | None] = []
        try:
            for row, (layer, (start, stop)) in enumerate(zip(layers, spans, strict=True)):
                if start == stop:
                    answers.append(None)
                    continue
                seen, (held, first) = layer.get_seq_length(), layer.get_mask_sizes(stop - start)
                query, key, value, _ = _row(given, row, start, stop)
                key, value = layer.update(key, value)
                answers.append(native(query, key, value, given.padding.of_row(stop - start, seen, held, first)))
        except BaseException:
            for layer, was in zip(layers, before, strict=True):
                vars(layer).clear()
                vars(layer).update(was)
            raise
        return _together(answers, given, spans)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands the new tokens on; they are stored when attention is called on them."""
        return self.hand_on(key_states, value_states)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Columns that the longest member has seen."""
        return max((member.get_seq_length() for member in self.members), default=0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of the columns of this pass alone: masks do not reach behind them."""
        return query_length, 0

    def get_max_length(self) -> int:
        return -1


def is_window(layer: Any) -> bool:
    """Whether a native layer holds the keys of a sliding window and nothing else."""
    return type(layer) is DynamicSlidingWindowLayer


def _row(given: AttentionInputs, row: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Query, key, value and positions of one row's tokens."""
    own = slice(row, row + 1)
    query, key, value, places = given.query[own], given.key[own], given.value[own], given.positions
    places = None if places is None else places if len(places) == 1 else places[own]
    if stop - start == given.query.shape[2]:
        return query, key, value, places
    places = None if places is None else places[:, start:stop]
    return query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop], places


def _together(answers: Sequence[Tensor | None], given: AttentionInputs, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Answers [1, n, heads, dv] of rows as those of the batch."""
    b, heads, t, _ = given.query.shape
    if all(span == (0, t) for span in spans):
        return torch.cat([answer for answer in answers if answer is not None])
    out = given.value.new_zeros(b, t, heads, given.value.shape[3])
    for row, (answer, (start, stop)) in enumerate(zip(answers, spans, strict=True)):
        if answer is not None:
            out[row, start:stop] = answer[0]
    return out
