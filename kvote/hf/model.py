"""What a model is made of, and the switch to kvote's attention."""

from functools import partial
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvote.errors import UnsupportedModelError
from kvote.hf.attention import attention
from kvote.hf.mask import mask

_PREFIX = "kvote_over_"


def attach(model: PreTrainedModel) -> None:
    """Switches ``model`` to kvote's attention; with any other cache it behaves as before."""
    native = model.config._attn_implementation or "eager"
    if native.startswith(_PREFIX):
        return
    if native not in ALL_MASK_ATTENTION_FUNCTIONS:
        native = "sdpa"
    # "flash" in a name makes transformers look for a kernel of that name.
    name = _PREFIX + native.replace("flash_attention_", "fa")
    AttentionInterface.register(name, partial(attention, native))
    AttentionMaskInterface.register(name, partial(mask, native))
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
