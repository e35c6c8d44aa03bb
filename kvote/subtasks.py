"""Encoding anew what came behind dropped subtasks, for ``tim``."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from kvote.cache import Cache
from kvote.errors import InputError
from kvote.hf.cache_layer import CacheLayer
from kvote.keep.subtasks import INSIDE, Subtasks, Visible


def encode_again(model: PreTrainedModel, cache: Cache) -> Tensor | None:
    """Feeds once more, in one pass, what came behind subtasks that were dropped since the last time, so that ``cache``
    holds what it would if they had never been there.

    Returns the logits [1, vocabulary] of the last token, which take the place of those it had; None where nothing was
    dropped. Raises InputError for another method than ``tim``, for several sequences, padding, or a model with layers
    that kvote does not manage.
    """
    keeper, parts = cache.method.keep, cache.managed
    if not isinstance(keeper, Subtasks):
        raise InputError(
            f"Only a method that drops finished subtasks can encode again what follows; got {cache.method.spec}."
        )
    if not all(isinstance(layer, CacheLayer) for layer in cache.layers):
        raise InputError(
            "This model has layers that kvote does not manage, and what they hold cannot be encoded again."
        )
    if any(part.sequences > 1 or part.columns is not None for part in parts):
        raise InputError("What follows subtasks is encoded again for one sequence without padding.")
    memory: Visible | None = parts[0].record.memory
    if memory is None or 0 not in memory.stale:
        return None
    stale = memory.stale[0]
    ids, inside = memory.ids[0][stale:].long(), (memory.parts[0][stale:] == INSIDE).tolist()
    cache.forget_shown(len(ids))
    start = cache.get_seq_length()
    for i, marked in enumerate(inside):
        if marked:
            cache.mark_span(keeper.mark, start + i, start + i + 1)
    with torch.no_grad():
        out = model(input_ids=ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1]


class EncodesAgain(LogitsProcessor):
    """For ``generate(..., logits_processor=[EncodesAgain(model, cache)])``: calls ``encode_again`` whenever subtasks
    were dropped."""

    def __init__(self, model: PreTrainedModel, cache: Cache) -> None:
        self.model, self.cache = model, cache

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        again = encode_again(self.model, self.cache)
        return scores if again is None else again.to(scores.dtype)
