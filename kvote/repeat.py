"""Reading a prompt again, for methods that judge tokens by what a repeat of the text looks at."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvote.cache import Cache
from kvote.errors import InputError
from kvote.hf.cache_layer import recording

# Tokens before a piece that say where it begins.
_BEFORE = 8
_WHOLE = "\n\nRepeat the text above word for word:\n"
_PART = "\n\nRepeat the text above word for word, going on behind these words:"


def read_again(
    model: PreTrainedModel, cache: Cache, ids: Tensor, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Feeds a prompt once more, so that a method that needs it (``kvzip``) can drop tokens; does nothing for others.

    ``ids`` [rows, columns]: all that ``cache`` has read, padding included. They come in pieces, each behind an
    instruction to repeat it if there is a ``tokenizer`` to encode one, and each is forgotten before the next. Raises
    InputError for other ids, or where tokens have been dropped already. Interrupted, the cache refuses to go on until
    it is reset.
    """
    size, columns = cache.method.keep.needs.repeat_chunk, cache.get_seq_length()
    if not size:
        return
    rows = cache.managed[0].sequences
    if tuple(ids.shape) != (rows, columns) or not columns:
        raise InputError(
            f"read_again takes the ids of all that the cache has read, {rows} by {columns}; got "
            f"{' by '.join(map(str, ids.shape))}."
        )
    if any(part.activity.dropped for part in cache.managed):
        raise InputError("This prompt has been cut down already; call cache.reset() to begin with another.")
    cache.check()
    marked = cache.announced.marked
    # What comes behind the prompt is still to come.
    cache.announced.marked = marked.until(columns)
    try:
        with torch.no_grad(), recording(cache):
            for start in range(0, columns, size):
                _repeat(model, cache, ids, (start, min(columns, start + size)), tokenizer)
    except BaseException:
        # What was heard of half a prompt is worth nothing.
        cache.passes.corrupt = True
        raise
    finally:
        cache.announced.marked = marked


def _repeat(model: PreTrainedModel, cache: Cache, ids: Tensor, piece: tuple[int, int], tokenizer: Any) -> None:
    """Feeds the columns of one ``piece``, and forgets them."""
    (start, stop), columns, parts = piece, ids.shape[1], cache.managed
    told = parts[0].columns
    valid = torch.ones_like(ids, dtype=torch.bool) if told is None else told.to(ids.device)
    before = slice(max(0, start - _BEFORE), start)
    words = [_words(tokenizer, _PART if start else _WHOLE, ids)]
    if start and tokenizer is not None:
        words += [ids[:, before], _words(tokenizer, "\n", ids)]
    known = [torch.ones_like(part, dtype=torch.bool) for part in words]
    if len(known) > 1:
        known[1] = valid[:, before]
    fed = torch.cat([*words, ids[:, start:stop]], dim=1)
    new = torch.cat([*known, valid[:, start:stop]], dim=1)
    padding: dict[str, Any] = {}
    if told is not None:
        positions = cache.positions(parts[0].index)
        after = torch.tensor([[int(lanes[0][-1]) + 1] for lanes in positions], device=ids.device)
        padding["attention_mask"] = torch.cat([valid, new], dim=1).long()
        padding["position_ids"] = (after + new.cumsum(dim=1) - 1).clamp(min=0)
    slots = valid[:, :stop].cumsum(dim=1)
    starts = slots[:, start - 1].tolist() if start else [0] * len(ids)
    flags = [(part.record_past, part.right_padded) for part in parts]
    try:
        for part in parts:
            part.record_past = True
        cache.passes.repeats = [range(a, z) for a, z in zip(starts, slots[:, -1].tolist(), strict=True)]
        model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1, **padding)
    finally:
        cache.passes.repeats = None
        for part, (recorded, right_padded) in zip(parts, flags, strict=True):
            part.record_past, part.right_padded = recorded, right_padded
    cache.crop_to(columns)


def _words(tokenizer: Any, text: str, ids: Tensor) -> Tensor:
    """The ids of a text for each row, of no tokens without a tokenizer."""
    told = tokenizer(text, add_special_tokens=False).input_ids if tokenizer is not None else []
    return torch.tensor(told, dtype=ids.dtype, device=ids.device)[None].expand(len(ids), -1)
