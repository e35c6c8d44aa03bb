"""Cache: what ``generate()`` holds. One kvote layer per full-attention layer of the model, native layers elsewhere."""

import copy
import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers import Cache as TransformersCache
from transformers import PreTrainedModel

from kvote.errors import InactiveCacheError, InputError
from kvote.extra_inputs import MARKS
from kvote.heads import HeadGroups, in_head_groups
from kvote.hf.cache_layer import CacheLayer, columns_of, forget_states, has_states
from kvote.hf.compiling import uncompiled
from kvote.hf.facts import facts_of, ropes_of
from kvote.hf.input_hooks import input_hooks
from kvote.hf.model import native_layers
from kvote.layer import Layer, LayerStack
from kvote.made_for import checked
from kvote.marked import Marked
from kvote.method import Method
from kvote.numbers import is_whole
from kvote.passes import Passes
from kvote.phase import AnnouncedPrompt
from kvote.read_counts import ReadCounts
from kvote.report import Report, nbytes_of, report_of
from kvote.standing import agree, check_agreement, check_crop, fewest, holds
from kvote.store.family import FORK

# Positions are counted in 32 bits.
_MOST_TOKENS = 2**31 - 1


class Cache(TransformersCache):
    """A drop-in for ``past_key_values``: ``model.generate(**inputs, past_key_values=kvote.Cache(model, method))``.

    ``method`` is an object from ``kvote.methods`` or a spec such as ``"tokenselect(top_k=512)"``. Building the cache
    switches the model to kvote's attention, which leaves runs with other caches as they were.

    Raises MethodError for a method that does not make sense, UnsupportedModelError for a model that asks something of
    attention that the method cannot honour, and InputError for a calibration that was made for another model.

    A pass that is interrupted leaves the cache as it was, or the next one raises InterruptedPassError, which says what
    to crop. A thread that uses the cache while another does gets a BusyCacheError.
    """

    def __init__(self, model: PreTrainedModel, method: Method | str = "dense") -> None:
        self.method, self._model = checked(model, method), ref(model)
        for calibration in self.method.calibrations:
            calibration.check(model)
        self.announced, self.passes = AnnouncedPrompt(), Passes()
        self._reads: ReadCounts | None = None
        layers: list[Any] = []
        previous = None
        facts = facts_of(model)
        self.trial_seconds = facts.seconds
        ours = facts.layers
        self.method.read.check(len(ours))
        ropes = ropes_of(ours) if self.method.needs_rope else {}
        stack = LayerStack[Layer]()
        for index, held in enumerate(native_layers(model)):
            if index in ours:
                fact = ours[index]
                rope = ropes.get(index)
                head_groups = in_head_groups(index, self.method, rope, len(ours), fact.key_heads, self.passes)
                layer = head_groups or Layer(index, self.method, rope, len(ours), stack, passes=self.passes)
                held = previous = CacheLayer(layer, self.announced, previous, fact.rotated, fact.rotary)
                if fact.rotary is not None:
                    fact.rotary.note_positions()
            layers.append(held)
        super().__init__(layers=layers)
        # Held, not used.
        self._input_hooks = input_hooks(model) if self.method.needs.extra_inputs - {MARKS} else None
        # Where a pass begins and ends: of kvote's layers, of those that count columns, and of those that do not.
        self._ends = (min(ours), max(ours))
        self.counting = [index for index, layer in enumerate(layers) if columns_of(layer) is not None]
        self.states = [index for index, layer in enumerate(layers) if has_states(layer)]
        self.passes.has_native_states = bool(self.states)

    @property
    def managed(self) -> list[Layer]:
        """The layers that kvote manages (all but the sliding and linear ones of hybrid models), each group of key heads
        that is kept in a way of its own by itself."""
        return [part for layer in self._own for part in layer.parts]

    @property
    def _own(self) -> list[Layer | HeadGroups]:
        return [layer.layer for layer in self.layers if isinstance(layer, CacheLayer)]

    def expect(self, tokens: int, *, question_follows: bool = False) -> None:
        """Announces a prompt of ``tokens`` columns that will come in several passes (``prefill_chunk_size``).

        Only its end then counts as the tail that selects token by token; with ``question_follows`` not even that.
        Without this call, the end of every pass does. Memory for the tokens is set aside in one piece. Raises
        InputError for a number that makes no sense.
        """
        if not is_whole(tokens) or not 0 <= tokens <= _MOST_TOKENS:
            raise InputError(f"expect takes a number of tokens from 0 to {_MOST_TOKENS:,}; got {tokens!r}.")
        self.passes.claim(self)
        self.announced.end = self.get_seq_length() + tokens
        self.announced.question_follows = question_follows
        with self._exclusive:
            for layer in self._own:
                layer.expect(tokens)

    def mark_span(self, name: str, start: int | Sequence[int], stop: int | Sequence[int]) -> None:
        """Says what columns ``start`` to ``stop`` of the text are, which is still to come: ``name`` is "image",
        "system", "document", "question" or whatever a method goes by that needs marks. Lists of numbers have one for
        each prompt of a batch, whose columns count padding. A crop forgets what it marked of the columns that go.

        Raises InputError for columns that have been read already, and for what is no span.
        """
        self.passes.claim(self)
        self.announced.marked.add(name, start, stop, self.get_seq_length())

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` columns in every layer, or, if one of them cannot, in none.

        Where an interrupted pass has left layers that differ, all are cut to what ``get_seq_length()`` says and
        ``tokens_to_remove``. Raises CropError if tokens that the method has dropped would have to return,
        InterruptedPassError if a layer holds too little for that, and InputError for what is no such number.
        """
        if not is_whole(tokens_to_remove) or tokens_to_remove > 0:
            raise InputError(
                "crop takes how many tokens to remove from the end, as a negative whole number such as -3; got "
                f"{tokens_to_remove!r}."
            )
        self.crop_to(max(0, self.get_seq_length() + int(tokens_to_remove)))

    def crop_to(self, columns: int) -> None:
        """Cuts every layer to its first ``columns``. Raises as ``crop``."""
        self.passes.claim(self)
        self.passes.check()
        check_crop(self, columns)
        # Layers that do not count have seen what the first one has, if no pass was interrupted.
        remove, interrupted = columns - self.get_seq_length(), columns == fewest(self) and not agree(self)
        with self._changing():
            for layer in self.layers:
                own = columns_of(layer)
                more = remove if own is None else columns - own
                if interrupted and isinstance(layer, CacheLayer):
                    layer.take_back(-more)
                elif more or isinstance(layer, CacheLayer) or getattr(layer, "record_past", False):
                    layer.crop(more)
            if not interrupted:
                self.announced.marked.crop(columns, columns - remove)

    def forget_shown(self, columns: int) -> None:
        """Forgets the last ``columns`` columns of one sequence, fed while past was recorded, after keepers were shown
        them; what stays of the rest is decided now."""
        self.passes.claim(self)
        self.check()
        seen = self.get_seq_length()
        with self._changing():
            self.announced.marked.crop(seen - columns, seen)
            for layer in self.layers:
                if isinstance(layer, CacheLayer):
                    for part in layer.layer.parts:
                        part.forget_shown(columns)
                else:
                    layer.crop(-columns)
            self.announced.end = 0

    def holds(self, columns: int) -> bool:
        """Whether every layer holds ``columns`` columns, as after a pass that was not interrupted."""
        return holds(self, columns)

    def check(self) -> None:
        """Raises InterruptedPassError if the last pass has not gone through all layers."""
        self.passes.check()
        check_agreement(self)

    @property
    def _exclusive(self) -> AbstractContextManager[Any]:
        """Forks that share pages change one after the other."""
        return nullcontext() if self.passes.lock is None else self.passes.lock

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """For what changes all layers: interrupted in the middle of it, they cannot be relied on any more."""
        with self._exclusive:
            self.passes.corrupt = True
            yield
            self.passes.corrupt = False

    @uncompiled
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers' ``Cache``. Raises InterruptedPassError and BusyCacheError."""
        self.passes.claim(self)
        if layer_idx == self.counting[0]:
            self.check()
        if self.states:
            self._reach(layer_idx, "attention")
        layer = self.layers[layer_idx]
        if isinstance(layer, CacheLayer) and not self.offloading:
            return layer.hand_on(key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @uncompiled
    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """As transformers' ``Cache``. Raises InterruptedPassError and BusyCacheError."""
        self._reach(layer_idx, f"conv {state_idx}")
        return super().update_conv_state(conv_states, layer_idx, state_idx, **kwargs)

    @uncompiled
    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """As transformers' ``Cache``, for models that write into the state. Raises as ``update_conv_state``."""
        self._reach(layer_idx, f"written conv {state_idx}")
        return super().get_conv_state(layer_idx, state_idx)

    @uncompiled
    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """As transformers' ``Cache``, for models that write into the state. Raises as ``update_conv_state``."""
        self._reach(layer_idx, f"written recurrent {state_idx}")
        return super().get_recurrent_state(layer_idx, state_idx)

    @uncompiled
    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """As transformers' ``Cache``. Raises InterruptedPassError and BusyCacheError."""
        self._reach(layer_idx, f"recurrent {state_idx}")
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, **kwargs)

    def _reach(self, layer_idx: int, state: str) -> None:
        """Notes how far a pass has come, for native layers whose states cannot be taken back and tell no length."""
        self.passes.claim(self)
        self.passes.check()
        ends = sorted({*self.counting, *self.states})
        if not self.passes.reach(layer_idx, state, ends[0], ends[-1]):
            self.passes.corrupt = True
            self.passes.check()

    @uncompiled
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As transformers' ``Cache``. Raises InterruptedPassError for layers that differ, and BusyCacheError."""
        self.passes.claim(self)
        first, last = self._ends
        if layer_idx == first and self.layers[first].get_seq_length() != self.layers[last].get_seq_length():
            self.check()
        return super().get_mask_sizes(query_length, layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As transformers' ``Cache``."""
        self.passes.claim(self)
        self.check()
        with self._changing():
            self.announced.marked.select(beam_idx, self._rows)
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As transformers' ``Cache``."""
        self.passes.claim(self)
        self.check()
        with self._changing():
            self.announced.marked.select(torch.arange(self._rows).repeat_interleave(repeats), self._rows)
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """As transformers' ``Cache``."""
        self.passes.claim(self)
        self.check()
        with self._changing():
            self.announced.marked.select(indices, self._rows)
            super().batch_select_indices(indices)

    @property
    def _rows(self) -> int:
        return max(part.sequences for part in self.managed)

    def reset(self) -> None:
        """Back to the state before the first token; memory is given back."""
        self.passes.claim(self)
        with self._changing():
            for index in self.states:
                forget_states(self.layers[index])
            super().reset()
            self.passes.begin_anew()
            self.announced.end, self.announced.marked = 0, Marked()

    def nbytes(self) -> int:
        """Bytes held: keys, values, positions, indexes, tables and what readers remember, in every layer."""
        self._check_active()
        return nbytes_of(self.layers)

    def positions(self, layer: int) -> list[list[Tensor]]:
        """Original positions of the tokens that ``layer`` holds: int32 [tokens] for each sequence and key head.

        Raises IndexError if kvote does not manage that layer.
        """
        for candidate in self._own:
            if candidate.index == layer:
                return [candidate.positions(row) for row in range(candidate.sequences)]
        raise IndexError(f"Layer {layer} is not managed by kvote (it is native to the model, or does not exist).")

    def report(self) -> Report:
        """Per layer: tokens seen and held, read per query, selections made and reused, bytes; and the most bytes that
        the cache has held.

        Raises InactiveCacheError if kvote's attention never ran.
        """
        self._check_active()
        if self.get_seq_length() == 0:
            raise InactiveCacheError("Nothing to report: no token has gone through this cache yet.")
        return report_of(self.method.spec, self._own, self.nbytes(), self.passes.peak, self.trial_seconds)

    @property
    def model(self) -> PreTrainedModel:
        """The model that it was made for. Raises InputError if that is gone."""
        model = self._model()
        if model is None:
            raise InputError("The model of this cache is gone, and without it the cache cannot be saved.")
        return model

    def save(self, path: str | Path) -> None:
        """Writes the cache into a file of mode 0600, compressed as it is, at once: any failure leaves the old file.

        Raises InputError where it cannot be written, and what ``check`` raises.
        """
        importlib.import_module("kvote.saving.caches").save(self, path)

    @staticmethod
    def load(path: str | Path, model: PreTrainedModel, method: Method | str | None = None) -> "Cache":
        """The cache in a file that ``save`` wrote. It goes on exactly as the saved one would have.

        ``method``: that of the saved cache, where the file cannot tell how to build it. Raises InputError for a file
        that is damaged, or was made with another model or other weights, and MethodError for want of a method.
        """
        cache: Cache = importlib.import_module("kvote.saving.caches").load(path, model, method)[0]
        return cache

    def equals(self, other: "Cache") -> bool:
        """Whether ``other``, of the same model and method, holds the same, bit by bit, and so would go on alike."""
        return bool(importlib.import_module("kvote.saving.caches").equal(self, other))

    def __reduce__(self) -> Any:
        # The model goes along, as what is derived from it does not.
        saving = importlib.import_module("kvote.saving.caches")
        return saving.restored, saving.parts(self)

    def __deepcopy__(self, memo: dict[Any, Any]) -> "Cache":
        """An independent copy of everything held; the model it belongs to is shared."""
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        # Rope objects hold the model's rotary module, which must not be copied with every cache.
        for layer in self.managed:
            if layer.rope is not None:
                memo[id(layer.rope)] = layer.rope
        with self._exclusive:
            clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def watch_reads(self) -> None:
        """From now on, counts which tokens every generated one reads, for ``reads``. Steps take longer."""
        self._reads = ReadCounts()
        for layer in self.managed:
            layer.reads = self._reads

    def reads(self, row: int = 0) -> Tensor:
        """Which share of the generated tokens' queries, of all layers and heads, has read each position of a sequence
        since ``watch_reads``: float32 [tokens seen]. Raises InputError where nobody watched."""
        if self._reads is None:
            raise InputError("Nobody has watched what was read; call cache.watch_reads() before generating.")
        return self._reads.shares(row, self.get_seq_length())

    def fork(self) -> "Cache":
        """A second cache that holds the same and goes on by itself. Pages of tokens are shared until one of both writes
        to them, so a fork costs what differs; what a store holds elsewhere (a low-rank prompt, say), native layers and
        what readers and keepers remember are copied.

        ``nbytes()`` of each counts the pages that it shares. Forks may be used by different threads, whose layers then
        take turns, and may sit in one ``Rows``. Pages that only a fork held are free once it is gone. Raises
        InterruptedPassError if the last pass was interrupted.
        """
        self.passes.claim(self)
        self.check()
        self._check_active()
        if self.passes.lock is None:
            self.passes.lock = threading.RLock()
        with self.passes.lock:
            clone = self.__deepcopy__({FORK: True})
            clone.passes.lock = self.passes.lock
        return clone

    def _check_active(self) -> None:
        if any(isinstance(layer, CacheLayer) and layer.pending for layer in self.layers):
            raise InactiveCacheError(
                "The model ran without kvote's attention, so this cache holds nothing. Build a new one."
            )
