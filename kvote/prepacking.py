"""Prefill: a batch of prompts is read without its padding (Prepacking: Zhao, Israel, Van den Broeck, Grover, AISTATS
2025, arXiv 2404.09529)."""

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvote.cache import Cache
from kvote.errors import InputError, UnsupportedModelError
from kvote.hf.cache_layer import CacheLayer
from kvote.hf.model import innermost, name_of
from kvote.prepacked import Prepacked


@torch.inference_mode()
def prefill(model: PreTrainedModel, cache: Cache, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """Reads all but the last column of ``input_ids`` [rows, columns] into an empty ``cache``; ``generate()`` with the
    same tokens and mask goes on from there.

    Prompts that ``attention_mask`` [rows, columns] pads on the left are laid one behind the other into as few rows as
    they fit in, none longer than the longest of them, so nothing is computed for padding but what is left at the ends
    of these rows. Each prompt has its own positions and its own place in the cache; what it holds is what it would hold
    alone, up to rounding. The last column is left to ``generate()``, because answers begin with it.

    Raises InputError for a cache that is not empty, for masks that do not fit or pad behind tokens, and for methods
    that look at token ids or hidden states; UnsupportedModelError for models that have layers of their own beside
    kvote's, or choose positions by themselves.
    """
    valid = _checked(model, cache, input_ids, attention_mask)
    packed = Prepacked.of(valid[:, :-1])
    if not packed.bins:
        # Every prompt is a single token, with which its answer begins.
        return
    cache.expect(input_ids.shape[1])
    feed = {"input_ids": packed.pack(input_ids[:, :-1]), "position_ids": packed.pack(packed.positions)}
    cache.announced.prepacked = packed
    try:
        model(**feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        cache.announced.prepacked = None


def _checked(model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Which columns are tokens, bool [rows, columns]. Raises as ``prefill``."""
    if cache.get_seq_length():
        raise InputError(f"This cache has seen {cache.get_seq_length()} tokens; prefill takes an empty one.")
    if ids.dim() != 2 or 0 in ids.shape:
        raise InputError(f"input_ids is [rows, columns], with tokens in it; got {list(ids.shape)}.")
    if mask is not None and mask.shape != ids.shape:
        raise InputError(f"attention_mask is {list(ids.shape)} like input_ids; got {list(mask.shape)}.")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()
    if not bool(valid[:, -1].all()) or bool((valid[:, :-1] & ~valid[:, 1:]).any()):
        raise InputError("Prompts must be padded on the left; set tokenizer.padding_side = 'left'.")
    native = next((type(layer).__name__ for layer in cache.layers if not isinstance(layer, CacheLayer)), None)
    if native is not None:
        raise UnsupportedModelError(
            f"{name_of(model)} has layers of the kind {native}, which would mix prompts that share a row; call "
            "generate() with the padded batch."
        )
    if "position_ids" not in inspect.signature(innermost(model).forward).parameters:
        raise UnsupportedModelError(f"{name_of(model)} takes no position_ids, so prompts cannot share a row.")
    if cache.method.needs.extra_inputs:
        what = " and ".join(sorted(cache.method.needs.extra_inputs))
        raise InputError(f"{cache.method.spec} looks at the {what} of a batch as it is; call generate() with it.")
    return valid
