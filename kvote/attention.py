"""The seam to transformers. The only file that knows transformers' internals; tests/test_attention.py guards each.

What it relies on (checked on 5.23):
- ``AttentionInterface.register`` and ``AttentionMaskInterface.register``; ``model.set_attn_implementation(name)``.
- A layer calls ``cache.update(k, v, layer_idx)`` and hands the returned key tensor to the attention function: an
  attribute set on that tensor arrives there. Nothing global, no hooks, no patched classes.
- The mask made by the registered mask function arrives unchanged, and so does an attribute set on it.
- Attention layers pass ``position_ids`` on to the attention function.
- A model file defines ``apply_rotary_pos_emb`` and ``eager_attention_forward``; the text model has ``rotary_emb``.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvote.errors import InactiveCacheError, InputError, UnsupportedModelError
from kvote.heads import HeadGroups
from kvote.kernels import rotate
from kvote.layer import Layer, Step
from kvote.rope import Rope
from kvote.store.segment import Logits

_PREFIX = "kvote_over_"
_PADDING = "_kvote_padding"
_LAYER = "_kvote_layer"
_DRAFTS = 32


@dataclass
class Turn:
    """The prompt that was announced: the column where it ends (0: none was), and whether a question follows it."""

    end: int = 0
    question_follows: bool = False


class CacheLayer(CacheLayerMixin):
    """A layer as ``generate()`` sees it. Lengths are in columns of the batch, padding included."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, layer: Layer | HeadGroups, turn: Turn, previous: "CacheLayer | None") -> None:
        super().__init__()
        self.layer, self.turn, self.previous = layer, turn, previous
        self.pending = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hands the new tokens on, with this layer attached; they are stored when attention is called on them."""
        for waiting in (self, self.previous):
            if waiting is not None and waiting.pending:
                waiting.pending = False
                raise InactiveCacheError(
                    "The model ran without kvote's attention, so this cache holds nothing; the attention "
                    "implementation was changed after kvote.Cache(model, ...). Build a new cache."
                )
        self.pending = True
        key = key_states.view_as(key_states)
        setattr(key, _LAYER, self)
        return key, value_states

    def get_seq_length(self) -> int:
        return self.layer.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layer.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    @property
    def is_croppable(self) -> bool:
        return not self.layer.method.keep.drops or self.record_past

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
            raise ValueError("crop takes a negative number: how many tokens to remove from the end.")
        if tokens_to_remove:
            # What follows is another prompt than the one announced.
            self.turn.end = 0
        self.layer.crop(-tokens_to_remove)

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


@dataclass
class Padding:
    """Rides on the mask: which new and past columns are tokens, and how to make the mask that other caches need.

    ``valid`` [b, t] and ``past`` [b, seen] are None where all are tokens.
    """

    valid: Tensor | None
    past: Tensor | None
    native: Callable[[], Tensor | None]
    _made: list[Tensor | None] = field(default_factory=list)

    def native_mask(self) -> Tensor | None:
        if not self._made:
            self._made.append(self.native())
        return self._made[0]


def _mask(native: str, **kwargs: Any) -> Tensor | None:
    """The mask function: for full attention a token of size 0 with the 2-D padding attached, never an N x N mask."""
    if isinstance(kwargs["q_offset"], Tensor):
        # A static cache counts in place, and the native mask is made after it has counted this pass.
        kwargs["q_offset"] = kwargs["q_offset"].clone()
    make = partial(ALL_MASK_ATTENTION_FUNCTIONS[native], **kwargs)
    if kwargs["mask_function"] is not causal_mask_function:
        return make()
    mask, t = kwargs.get("attention_mask"), kwargs["q_length"]
    valid = past = None
    if mask is not None:
        seen = kwargs["q_offset"]
        if mask.shape[1] < seen + t:
            raise InputError(
                f"The attention mask covers {mask.shape[1]} tokens, but the cache holds {seen} and {t} are new; pass a "
                "mask over all of them."
            )
        new = mask[:, seen : seen + t]
        valid = None if bool(new.all()) else new
        past = None if bool(mask[:, :seen].all()) else mask[:, :seen]
    # Four axes, so that masks which generate() makes ahead pass through the model unchanged.
    carrier = torch.empty(0, 0, 0, 0, dtype=torch.bool)
    setattr(carrier, _PADDING, Padding(valid, past, make))
    return carrier


def _attention(
    native: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function. Layers of other caches (sliding ones of a hybrid model, say) go to ``native``."""
    padding: Padding | None = getattr(attention_mask, _PADDING, None)
    owner: CacheLayer | None = getattr(key, _LAYER, None)
    if owner is None:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(native, eager)
        mask = attention_mask if padding is None else padding.native_mask()
        return attend(module, query, key, value, mask, **kwargs)
    refused = [name for name in ("position_bias", "sliding_window", "cache") if kwargs.get(name) is not None]
    if kwargs.get("dropout"):
        refused.append("dropout")
    if attention_mask is not None and padding is None:
        refused.append("a custom attention mask")
    if refused:
        raise UnsupportedModelError(f"{type(module).__name__} asks attention for {', '.join(refused)}; kvote has none.")
    owner.pending = False
    t, seen = query.shape[2], owner.layer.seen
    positions = kwargs.get("position_ids")
    if positions is None and owner.layer.method.needs_rope:
        raise UnsupportedModelError(f"{type(module).__name__} does not tell attention its positions; use 'dense'.")
    if positions is None:
        positions = torch.arange(seen, seen + t, device=query.device)[None]
    if positions.dim() != 2:
        raise UnsupportedModelError(
            f"{type(module).__name__} uses {positions.dim()}-D positions; kvote needs one each."
        )
    scaling = kwargs.get("scaling")
    step = Step(
        query=query,
        key=key,
        value=value,
        positions=positions.expand(query.shape[0], -1),
        valid=None if padding is None or padding.valid is None else padding.valid.to(query.device),
        solo=_solo(owner.layer, owner.turn, t),
        decode=t == 1 and seen >= owner.turn.end,
        ahead=_ahead(owner.layer, owner.turn, t),
        past=None if padding is None or padding.past is None else padding.past.to(query.device),
        logits=Logits(query.shape[-1] ** -0.5 if scaling is None else scaling, kwargs.get("softcap")),
        sink_logits=kwargs.get("s_aux"),
    )
    return owner.layer.attend(step), None


def _solo(layer: Layer | HeadGroups, turn: Turn, t: int) -> int:
    """How many of the next ``t`` columns belong to the tail of a prompt or turn, or come after it."""
    tail = layer.method.read.tail
    if layer.seen < turn.end:
        return max(0, min(t, layer.seen + t - turn.end + (0 if turn.question_follows else tail)))
    if layer.record_past:
        # Assisted decoding verifies drafts as the decode steps they stand for; its first pass has them behind a prompt.
        return t if layer.seen else min(t, tail + _DRAFTS)
    return t if t == 1 else min(t, tail)


def _ahead(layer: Layer | HeadGroups, turn: Turn, t: int) -> int | None:
    """How many tokens of the prompt come after the next ``t`` columns; None if those are generated ones.

    Without an announcement, the end of every pass is a prompt's end, unless it is a single token or verifies drafts.
    """
    if layer.seen < turn.end:
        return turn.end - layer.seen - t
    drafts = layer.record_past and t <= _DRAFTS
    return None if layer.seen and (t == 1 or drafts) else 0


def attach(model: PreTrainedModel) -> None:
    """Switches ``model`` to kvote's attention; with any other cache it behaves as before."""
    native = model.config._attn_implementation or "eager"
    if native.startswith(_PREFIX):
        return
    if native not in ALL_MASK_ATTENTION_FUNCTIONS:
        native = "sdpa"
    # "flash" in a name makes transformers look for a kernel of that name.
    name = _PREFIX + native.replace("flash_attention_", "fa")
    AttentionInterface.register(name, partial(_attention, native))
    AttentionMaskInterface.register(name, partial(_mask, native))
    model.set_attn_implementation(name)


def native_layers(model: PreTrainedModel) -> list[Any]:
    """The cache layers that transformers would use for this model. Raises UnsupportedModelError where none is ours."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; kvote manages decoder-only models.")
    if not getattr(model, "_supports_attention_backend", False):
        raise UnsupportedModelError(f"{name} does not route attention through transformers' AttentionInterface.")
    layers = list(DynamicCache(config=config).layers)
    if not any(is_full_attention(layer) for layer in layers):
        raise UnsupportedModelError(f"{name} has no full-attention layer, so there is nothing for kvote to manage.")
    return layers


def is_full_attention(layer: Any) -> bool:
    """Whether a native cache layer holds plain full attention (sliding, linear and shared ones stay native)."""
    return type(layer) is DynamicLayer


def key_heads(model: PreTrainedModel) -> int:
    """Key heads of a layer, as the model's config tells."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def find_ropes(model: PreTrainedModel, layers: list[int]) -> dict[int, Rope]:
    """The rotary embedding of each of ``layers``; those of one type share it. Raises UnsupportedModelError."""
    config = model.config.get_text_config(decoder=True)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    shared: dict[str, Rope] = {}
    for index in layers:
        if types[index] not in shared:
            shared[types[index]] = find_rope(model, index)
    return {index: shared[types[index]] for index in layers}


def find_rope(model: PreTrainedModel, layer_index: int) -> Rope:
    """The rotary embedding of a layer, proven on random numbers to be undone. Raises UnsupportedModelError."""
    name = type(model).__name__
    rotary = next(
        (m.rotary_emb for m in model.modules() if isinstance(getattr(m, "rotary_emb", None), torch.nn.Module)), None
    )
    modeling = sys.modules[type(model).__module__]
    apply = getattr(modeling, "apply_rotary_pos_emb", None)
    if rotary is None or apply is None:
        raise UnsupportedModelError(f"{name} has no rotary positions that kvote can undo; use method 'dense'.")
    config = model.config.get_text_config(decoder=True)
    module = _rotary_call(rotary, config, layer_index)
    fresh = still = None
    if any(kind in str(getattr(rotary, "rope_type", "")) for kind in ("longrope", "dynamic")):
        fresh = partial(_fresh_rotary_call, rotary, config, layer_index)
        # Below the decorator that chooses frequencies by the largest position.
        still = _rotary_call(rotary, config, layer_index, partial(inspect.unwrap(type(rotary).forward), rotary))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    positions = torch.tensor([[3, 5, 8, 1]], device=model.device)
    x = torch.randn(1, 1, 4, head_dim, device=model.device, generator=torch.Generator(model.device).manual_seed(0))
    cos, sin = module(positions, torch.float32)
    if cos.dim() != 3 or 2 * cos.shape[-1] < 2:
        raise UnsupportedModelError(f"{name} uses rotary positions of a form that kvote does not know; use 'dense'.")
    expected = apply(x, x, cos, sin)[0]
    for interleaved, repeated in ((False, True), (True, True), (False, False)):
        rope = Rope(module, interleaved, repeated, fresh, still)
        angles = rope.angles(positions, torch.float32)
        if 2 * angles[0].shape[-1] <= head_dim:
            mine = rotate(x, angles[0][:, None], angles[1][:, None], interleaved=interleaved)
            if torch.allclose(mine, expected, atol=1e-5) and torch.allclose(rope.undo(mine, angles), x, atol=1e-4):
                return rope
    raise UnsupportedModelError(f"{name} rotates keys in a way that kvote cannot undo; use method 'dense'.")


def _rotary_call(
    rotary: torch.nn.Module, config: Any, layer_index: int, call: Callable[..., Any] | None = None
) -> Callable[[Tensor, torch.dtype], Any]:
    """``call`` instead of the module itself, if given."""
    call = rotary if call is None else call
    typed = "layer_type" in inspect.signature(rotary.forward).parameters
    kwargs = {"layer_type": config.layer_types[layer_index]} if typed else {}

    def angles(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return call(torch.empty(0, dtype=dtype, device=positions.device), positions, **kwargs)

    return angles


def _fresh_rotary_call(rotary: torch.nn.Module, config: Any, layer_index: int) -> Callable[[Tensor, torch.dtype], Any]:
    """The same for a copy of the module without the state that the texts read so far have left in it."""
    clone: Any = copy.deepcopy(rotary)
    if hasattr(clone, "original_inv_freq"):
        clone.inv_freq = clone.original_inv_freq.clone()
        clone.max_seq_len_cached = clone.original_max_seq_len
    return _rotary_call(clone, config, layer_index)
