"""Cache: what ``generate()`` holds. One kvote layer per full-attention layer of the model, native layers elsewhere."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache as TransformersCache
from transformers import PreTrainedModel

from kvote.errors import InactiveCacheError
from kvote.heads import HeadGroups, in_groups
from kvote.hf.cache_layer import CacheLayer, Turn
from kvote.hf.facts import facts_of, rope_of_layer
from kvote.hf.model import native_layers
from kvote.layer import Crew, Layer
from kvote.method import Method, parse
from kvote.report import LayerReport, Report


class Cache(TransformersCache):
    """A drop-in for ``past_key_values``: ``model.generate(**inputs, past_key_values=kvote.Cache(model, method))``.

    ``method`` is an object from ``kvote.methods`` or a spec such as ``"tokenselect(top_k=512)"``. Building the cache
    switches the model to kvote's attention, which leaves runs with other caches as they were.

    Raises MethodError for a method that does not make sense, UnsupportedModelError for a model that asks something of
    attention that the method cannot honour, and InputError for a calibration that was made for another model.
    """

    def __init__(self, model: PreTrainedModel, method: Method | str = "dense") -> None:
        self.method = parse(method) if isinstance(method, str) else method
        for calibration in self.method.calibrations:
            calibration.check(model)
        self.turn = Turn()
        layers: list[Any] = []
        previous = None
        facts = facts_of(model)
        self.trial_seconds = facts.seconds
        ours = facts.layers
        self.method.read.check(len(ours))
        crew = Crew()
        for index, held in enumerate(native_layers(model)):
            if index in ours:
                fact = ours[index]
                rope = rope_of_layer(fact) if self.method.needs_rope else None
                groups = in_groups(index, self.method, rope, len(ours), fact.key_heads)
                layer = groups or Layer(index, self.method, rope, len(ours), crew)
                held = previous = CacheLayer(layer, self.turn, previous, fact.rotated, fact.rotary)
                if fact.rotary is not None:
                    fact.rotary.watch()
            layers.append(held)
        super().__init__(layers=layers)

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
        Without this call, the end of every pass does. Memory for the tokens is set aside in one piece.
        """
        self.turn.end = self.get_seq_length() + tokens
        self.turn.question_follows = question_follows
        for layer in self._own:
            layer.expect(tokens)

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last ``-tokens_to_remove`` columns in every layer, or, if one of them cannot, in none.

        Raises CropError if tokens that the method has dropped would have to return.
        """
        for layer in self._own:
            for part in layer.parts:
                part.check_crop(-tokens_to_remove)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Back to the state before the first token; memory is given back."""
        super().reset()
        self.turn.end = 0

    def nbytes(self) -> int:
        """Bytes held: keys, values, positions, sketches, tables and what readers remember, in every layer."""
        self._check_active()
        ropes = {id(layer.rope): layer.rope.nbytes for layer in self.managed if layer.rope is not None}
        return sum(_layer_nbytes(layer) for layer in self.layers) + sum(ropes.values())

    def positions(self, layer: int) -> list[list[Tensor]]:
        """Original positions of the tokens that ``layer`` holds: int32 [tokens] for each sequence and key head.

        Raises IndexError if kvote does not manage that layer.
        """
        for candidate in self._own:
            if candidate.index == layer:
                return [candidate.positions(row) for row in range(candidate.sequences)]
        raise IndexError(f"Layer {layer} is not managed by kvote (it is native to the model, or does not exist).")

    def report(self) -> Report:
        """Per layer: tokens seen and held, read per query, selections made and reused, bytes.

        Raises InactiveCacheError if kvote's attention never ran.
        """
        self._check_active()
        if self.get_seq_length() == 0:
            raise InactiveCacheError("Nothing to report: no token has gone through this cache yet.")
        layers = [LayerReport.of(layer.index, layer.parts) for layer in self._own]
        return Report(self.method.spec, layers, self.nbytes())

    def __deepcopy__(self, memo: dict[int, Any]) -> "Cache":
        """An independent copy of everything held; the model it belongs to is shared."""
        clone = object.__new__(type(self))
        memo[id(self)] = clone
        # Rope objects hold the model's rotary module, which must not be copied with every cache.
        for layer in self.managed:
            if layer.rope is not None:
                memo[id(layer.rope)] = layer.rope
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def _check_active(self) -> None:
        if any(isinstance(layer, CacheLayer) and layer.pending for layer in self.layers):
            raise InactiveCacheError(
                "The model ran without kvote's attention, so this cache holds nothing. Build a new one."
            )


def _layer_nbytes(layer: Any) -> int:
    if isinstance(layer, CacheLayer):
        return layer.layer.nbytes
    held = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)
