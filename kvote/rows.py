"""Rows: several caches in one batch, of unlike lengths and unlike methods."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache as TransformersCache
from transformers import PreTrainedModel

from kvote.cache import Cache
from kvote.errors import InputError, InterruptedPassError, UnsupportedModelError
from kvote.hf.cache_layer import CacheLayer
from kvote.hf.compiling import uncompiled
from kvote.hf.facts import facts_of
from kvote.hf.mask import NewColumns
from kvote.hf.model import name_of, native_layers
from kvote.hf.rows_layer import RowsLayer, is_window
from kvote.passes import Passes
from kvote.store.family import counted_once


class Rows(TransformersCache):
    """Several caches as one ``past_key_values``: row i of the batch goes on with the i-th cache that has joined.

    The caches may follow unlike methods and hold unlike lengths; each keeps what it holds and nothing is copied. The
    model runs once for all rows, and only attention goes row by row. Between two passes caches ``join`` and ``leave``,
    and one that has joined can be cropped or asked for its report as ever.

    A pass gives every row some tokens, padded on the left or the right, with ``attention_mask`` [rows, columns] of the
    new columns alone and ``position_ids`` [rows, columns]; ``inputs`` makes all three. A row without tokens sits out.
    What a row's tokens are, prompt or generated, is told by its own cache's ``expect``.

    A layer goes through a pass with all rows or with none. Where a pass ended between two layers, the next one raises
    InterruptedPassError, which says what to crop. Raises UnsupportedModelError for a model with recurrent layers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._members: list[Cache] = []
        self.passes = Passes()
        facts, layers, previous = facts_of(model).layers, [], None
        for index, native in enumerate(native_layers(model)):
            if index not in facts and not is_window(native):
                raise UnsupportedModelError(
                    f"{name_of(model)} has layers of the kind {type(native).__name__}, whose states cannot be kept "
                    "apart by row; run each cache by itself."
                )
            fact = facts.get(index)
            rotary = None if fact is None else fact.rotary
            if rotary is not None:
                rotary.note_positions()
            previous = RowsLayer(index, self._members, previous, sliding=fact is None, rotary=rotary)
            layers.append(previous)
        super().__init__(layers=layers)

    def __len__(self) -> int:
        return len(self._members)

    @property
    def caches(self) -> tuple[Cache, ...]:
        """The caches that have joined, in the order of their rows."""
        return tuple(self._members)

    def join(self, cache: Cache) -> int:
        """Makes ``cache`` the last row, and says which that is. Raises InputError for what is no cache of one sequence
        of this model, or has joined already, and InterruptedPassError if its last pass was interrupted."""
        self.passes.claim(self)
        if not isinstance(cache, Cache):
            raise InputError(f"A kvote.Cache can join; got a {type(cache).__name__}.")
        if cache.passes.batch is not None:
            raise InputError("This cache has joined a batch already; let it leave that first.")
        kinds = [isinstance(layer, CacheLayer) for layer in cache.layers]
        if kinds != [not layer.is_sliding for layer in self.layers]:
            raise InputError("This cache was made for a model with other layers.")
        rows = max(part.sequences for part in cache.managed)
        if rows > 1:
            raise InputError(f"A cache of one sequence can join; this one holds {rows}.")
        cache.passes.claim(cache)
        cache.check()
        cache.passes.joined = weakref.ref(self)
        self._members.append(cache)
        return len(self._members) - 1

    def leave(self, cache: Cache) -> Cache:
        """Takes ``cache`` out as it now is, to go on alone or to join again; rows behind it move up. Raises InputError
        if it has not joined."""
        self.passes.claim(self)
        for row, member in enumerate(self._members):
            if member is cache:
                del self._members[row]
                cache.passes.joined = None
                return cache
        raise InputError("This cache has not joined.")

    def inputs(
        self, tokens: Sequence[Sequence[int] | Tensor], device: torch.device | str | None = None
    ) -> dict[str, Any]:
        """What the model is called with to feed row i the ``tokens[i]``, none or several: ``input_ids``,
        ``attention_mask`` and ``position_ids`` [rows, columns], padded on the left, so that the logits of every row's
        last token are the last; and these rows as ``past_key_values``. Raises InputError where rows are missing.
        """
        if len(tokens) != len(self._members):
            raise InputError(f"{len(self._members)} caches have joined; got the tokens of {len(tokens)} rows.")
        rows = [torch.as_tensor(row, dtype=torch.int64).reshape(-1).cpu() for row in tokens]
        columns = max((len(row) for row in rows), default=0)
        if columns == 0:
            raise InputError("There are no tokens to feed; give at least one row some.")
        ids, mask, places = (torch.zeros(len(rows), columns, dtype=torch.int64) for _ in range(3))
        for i, (row, cache) in enumerate(zip(rows, self._members, strict=True)):
            if len(row):
                ids[i, -len(row) :], mask[i, -len(row) :] = row, 1
                seen = cache.managed[0].tokens_seen(0) if cache.get_seq_length() else 0
                places[i, -len(row) :] = torch.arange(seen, seen + len(row))
        made: dict[str, Any] = {"input_ids": ids, "position_ids": places}
        if not bool(mask.all()):
            made["attention_mask"] = mask
        return {name: tensor.to(device) for name, tensor in made.items()} | {"past_key_values": self, "use_cache": True}

    @uncompiled
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As transformers' ``Cache``. Raises InputError for a batch of other rows, InterruptedPassError and
        BusyCacheError."""
        if layer_idx == 0:
            self._begin()
        layer: RowsLayer = self.layers[layer_idx]
        return layer.hand_on(key_states, value_states)

    def _begin(self) -> None:
        self.passes.claim(self)
        if not self._members:
            raise InputError("No cache has joined; let one join before the model runs.")
        for row, cache in enumerate(self._members):
            cache.passes.claim(cache)
            try:
                cache.check()
            except InterruptedPassError as error:
                raise InterruptedPassError(f"Row {row}: {error}") from None

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Masks are made for the new columns alone."""
        return NewColumns(0)

    @uncompiled
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As transformers' ``Cache``, of the new columns alone."""
        return query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        raise InputError("Rows hold texts of their own; crop the cache whose text is to end earlier.")

    def reset(self) -> None:
        raise InputError("Rows hold texts of their own; reset the cache whose text is to go, or let it leave.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise InputError("Rows are caches of their own; fork one to go on with its text twice.")

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def nbytes(self) -> int:
        """Bytes held by all caches that have joined; pages that forks among them share are counted once."""
        with counted_once():
            return sum(cache.nbytes() for cache in self._members)
