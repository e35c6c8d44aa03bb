"""Peak: how many bytes a method will hold at most, foreseen before anything is read."""

from dataclasses import dataclass
from typing import Any

import torch

from kvote.method import Method
from kvote.store.low_rank import SharedLowRank
from kvote.store.merged import MergedPairs
from kvote.store.offloaded import Offloaded
from kvote.store.pages import PAGE
from kvote.store.uncompressed_tokens import ROOM, token_bytes


@dataclass(frozen=True)
class Shape:
    """The shape of a model's cache: ``layers`` with ``heads`` key heads each, of ``dim`` channels in ``dtype``."""

    layers: int
    heads: int
    dim: int
    dtype: torch.dtype


def shape_of(model: Any) -> Shape | None:
    """The shape that the config tells; None where it is silent. All layers count as full attention."""
    config = model.config.get_text_config(decoder=True)
    layers, heads = (getattr(config, name, 0) or 0 for name in ("num_hidden_layers", "num_attention_heads"))
    if not layers or not heads:
        return None
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(layers, getattr(config, "num_key_value_heads", None) or heads, dim, model.dtype)


def peak_bytes(method: Method, shape: Shape, tokens: int, *, tokens_per_pass: int) -> int:
    """Bytes of one announced prompt of ``tokens``, read ``tokens_per_pass`` at a time, when most of it is held.

    A prompt that comes in one pass is dropped or encoded layer by layer, so one layer at a time holds all of it; of one
    that comes in several, all layers do until its end, unless the method drops after every pass. What attention
    computes on the way is not counted, nor are tables of rotations, which layers share.
    """
    if isinstance(method.store, Offloaded) and not method.keep.offers.waits:
        here = min(tokens, method.store.recent + PAGE + tokens_per_pass)
        far = method.store.token_bytes(shape.heads, shape.dim, shape.dtype) * shape.heads * tokens
        return int(shape.layers * (_uncompressed_bytes(method, shape, here) * 9 / 8 + far))
    whole = _uncompressed_bytes(method, shape, _held(method, tokens, tokens_per_pass) + ROOM)
    later = min(whole, _later(method, shape, tokens))
    # Layers that are encoded together.
    together = min(
        shape.layers, method.store.layers_per_basis if isinstance(method.store, SharedLowRank | MergedPairs) else 1
    )
    if tokens > tokens_per_pass and not (method.keep.offers.drops and not method.keep.offers.waits):
        # The first of them are held in both forms; a merged pair takes little more than one of its layers did.
        both = min(together * later, whole) if isinstance(method.store, MergedPairs) else together * later
        return int(shape.layers * whole + (both if later < whole else 0))
    return int(together * whole + (shape.layers - together) * later)


def _held(method: Method, tokens: int, tokens_per_pass: int) -> int:
    """Tokens that a layer holds at most while a prompt comes."""
    offers, budget = method.keep.offers, method.keep.budget
    if not offers.drops or offers.waits or not offers.whole_layers or budget is None or budget.unit == "bytes":
        return tokens
    return min(tokens, budget.tokens(tokens) + tokens_per_pass)


def _later(method: Method, shape: Shape, tokens: int) -> float:
    """Bytes of a layer once the prompt has ended."""
    budget, store = method.keep.budget, method.store
    encoded = store.token_bytes(shape.heads, shape.dim, shape.dtype) * shape.heads
    if not method.keep.offers.drops or budget is None:
        kept, others = tokens, 0
    elif budget.unit == "bytes":
        return budget.amount / shape.layers
    else:
        kept = min(tokens, budget.tokens(tokens))
        others = tokens - kept if store.offers.retains else 0
    # An eighth of unused pages behind lanes; what was set aside beside encoded tokens is for those to come.
    spare = 2 * PAGE if method.keep.offers.drops else ROOM
    important = _uncompressed_bytes(method, shape, kept) if store.offers.retains else encoded * kept
    return important * 9 / 8 + encoded * others + _uncompressed_bytes(method, shape, spare)


def _uncompressed_bytes(method: Method, shape: Shape, tokens: int) -> float:
    """Bytes of ``tokens`` tokens of a layer as the model made them, with the indexes that a reader scores with."""
    each: float = token_bytes(shape.dim, shape.dim, shape.dtype)
    each += sum(index.token_bytes(shape.dim, shape.dtype) for index in method.read.needs.indexes)
    pages = -(-tokens // PAGE)
    return shape.heads * pages * PAGE * (each + method.keep.token_bytes)
