"""A layer as ``generate()`` sees it, between transformers' cache protocol and kvote's layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from kvote.errors import CropError, InactiveCacheError, InputError
from kvote.heads import HeadGroups
from kvote.hf.compiling import uncompiled
from kvote.hf.input_hooks import noted_inputs
from kvote.hf.rotary import RotaryPositions
from kvote.layer import Layer, Step
from kvote.phase import AnnouncedPrompt as AnnouncedPrompt
from kvote.store.segment import Scaling

_LAYER = "_kvote_layer"


class LayerHandoff:
    """Hands the new tokens of a pass on to attention with itself attached, and notices where kvote's attention never
    comes for them."""

    def __init__(self, previous: "LayerHandoff | None") -> None:
        self.previous = previous
        self.pending = False
        # Whether another layer of kvote's comes after this one in every pass.
        self.followed = False
        if previous is not None:
            previous.followed = True

    def hand_on(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """``update`` for a caller that is not compiled."""
        before = self.previous
        if before is None and self.followed:
            # The pass before this one never reached the next layer: it was interrupted before attention was called.
            self.pending = False
        if self.pending or (before is not None and before.pending):
            for waiting in (self, before):
                if waiting is None or not waiting.pending:
                    continue
                waiting.pending = False
                raise InactiveCacheError(
                    "The model ran without kvote's attention, so this cache holds nothing; the attention "
                    "implementation was changed after kvote.Cache(model, ...). Build a new cache."
                )
        self.pending = True
        key = key_states.view_as(key_states)
        setattr(key, _LAYER, self)
        return key, value_states


class CacheLayer(LayerHandoff, CacheLayerMixin):
    """A layer as ``generate()`` sees it. Lengths are in columns of the batch, padding included."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(
        self,
        layer: Layer | HeadGroups,
        announced: AnnouncedPrompt,
        previous: "CacheLayer | None",
        rotated: bool = True,
        rotary: RotaryPositions | None = None,
    ) -> None:
        """``rotated``: whether the model rotates keys here. ``rotary``: where attention is not told positions as they
        are, what tells them instead."""
        CacheLayerMixin.__init__(self)
        LayerHandoff.__init__(self, previous)
        self.layer, self.announced = layer, announced
        self.rotary = rotary
        # Whether the method has to know at which positions keys were rotated.
        self.needs_positions = rotated and layer.method.needs_rope
        self.extra_inputs = layer.method.needs.extra_inputs

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor | None,
        scaling: Scaling,
        sinks: Tensor | None,
        valid: Tensor | None = None,
        past: Tensor | None = None,
        columns: tuple[int, int] | None = None,
    ) -> Step:
        """The step that attention asks of the layer, with the phase of its text. Parameters as in ``Step``, but
        ``positions`` [1 or b, t] may be None: those behind the columns seen. ``columns``: the layer's part of a batch
        of several caches. Raises InputError where an extra input that the method needs is missing."""
        t, layer = query.shape[2], self.layer
        seen = layer.seen
        if positions is None:
            positions = torch.arange(seen, seen + t, device=query.device)[None]
        if len(positions) != len(query):
            positions = positions.expand(len(query), -1)
        phase = self.announced.phase(seen, t, layer.method.read.tail, drafts=layer.record_past)
        extra_inputs = None
        if self.extra_inputs:
            new = range(seen, seen + t)
            extra_inputs = noted_inputs(
                self.announced, self.extra_inputs, layer.method.spec, len(query), new, columns, query.device
            )
        return Step(
            query,
            key,
            value,
            positions,
            valid,
            phase.tail_queries,
            scaling,
            sinks,
            past,
            phase.decode,
            phase.prompt_left,
            extra_inputs,
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    # An attribute set on a tensor does not survive tracing.
    @uncompiled
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands the new tokens on, with this layer attached; they are stored when attention is called on them."""
        return self.hand_on(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.layer.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layer.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:
        method = self.layer.method
        return not (method.keep.offers.drops or method.read.offers.adds_up) or self.record_past

    @property
    def record_past(self) -> bool:
        return self.layer.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.layer.record_past = value

    @property
    def batch_size(self) -> int:
        return self.layer.sequences or -1

    def activate_past_recording(self) -> None:
        self.layer.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` columns (negative, as transformers passes it)."""
        if tokens_to_remove > 0:
            raise InputError("crop takes a negative number: how many tokens to remove from the end.")
        if tokens_to_remove:
            # What follows is another prompt than the one announced.
            self.announced.end = 0
        self.pending = False
        self.layer.crop(-tokens_to_remove)

    def take_back(self, columns: int) -> None:
        """Removes the last ``columns``, which an interrupted pass brought: the prompt announced is still to come."""
        self.pending = False
        self.layer.crop(columns, max(0, self.announced.end - self.layer.seen + columns))

    def reset(self) -> None:
        self.layer.reset()
        self.pending = self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.layer.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.layer.select([row for row in range(self.layer.sequences) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = torch.arange(self.layer.sequences)[torch.as_tensor(indices).cpu()]
        self.layer.select(rows.tolist())

    def offload(self) -> None:
        raise NotImplementedError("kvote layers cannot be offloaded by transformers' Cache(offloading=True).")

    prefetch = offload


def columns_of(layer: Any) -> int | None:
    """How many columns a cache layer has seen, also a native one; None for one that does not count them."""
    return int(layer.get_seq_length()) if isinstance(layer, CacheLayerMixin) else None


def has_states(layer: Any) -> bool:
    """Whether a native layer holds states that every pass overwrites."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def forget_states(layer: Any) -> None:
    """Makes a native layer's states what they were before the first token; its own reset keeps the size that recording
    gave them, into which the next prompt does not fit."""
    LinearAttentionCacheLayerMixin.__init__(layer, layer.number_of_states)


def check_native_crop(layer: Any, more: int) -> None:
    """Raises CropError if a native layer cannot be cropped by ``more`` (negative, as transformers passes it)."""
    if not more or isinstance(layer, CacheLayer):
        return
    window = getattr(layer, "sliding_window", None)
    gone = window is not None and layer.get_seq_length() >= window and not layer.record_past
    if gone or (has_states(layer) and not (layer.is_croppable and layer.record_past)):
        raise CropError(
            f"A native {type(layer).__name__} of the model has let go of what a rollback of {-more} needs; call "
            "cache.activate_past_recording() before the tokens that may be rolled back, or cache.reset()."
        )


@contextmanager
def recording(cache: Any) -> Iterator[None]:
    """Native layers keep what they would let go of, until the cache is cropped."""
    native = [layer for layer in cache.layers if not isinstance(layer, CacheLayer) and hasattr(layer, "record_past")]
    for layer in native:
        layer.record_past = True
    try:
        yield
    finally:
        for layer in native:
            layer.record_past = False


def owner_of(key: Tensor) -> Any:
    """The layer (``LayerHandoff``) that handed ``key`` to the model; None for another cache's keys."""
    return getattr(key, _LAYER, None)
