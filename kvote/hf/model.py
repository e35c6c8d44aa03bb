"""The config of a model: its name, its cache layers, and which of them hold full attention."""

from typing import Any

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicIndexedLayer, DynamicLayer, LinearAttentionLayer

from kvote.errors import UnsupportedModelError


def uncompiled_model(model: Any) -> Any:
    """The model below a wrapper of torch.compile."""
    return getattr(model, "_orig_mod", model)


def innermost(model: Any) -> Any:
    """The model whose own generate() runs, below wrappers of compilation and adapters."""
    model = uncompiled_model(model)
    base = getattr(model, "get_base_model", None)
    return model if base is None else base()


def name_of(model: Any) -> str:
    """The name of the model's class, below wrappers of adapters and compilation."""
    return type(innermost(model)).__name__


def native_layers(model: PreTrainedModel) -> list[Any]:
    """The cache layers that transformers would use for this model. Raises UnsupportedModelError where none is ours."""
    name = name_of(model)
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; kvote manages decoder-only models.")
    layers = list(DynamicCache(config=config).layers)
    if not any(is_full_attention(layer) for layer in layers):
        raise UnsupportedModelError(f"{name} has no full-attention layer{_instead(layers)}.")
    return layers


def is_full_attention(layer: Any) -> bool:
    """Whether a native cache layer holds plain full attention (sliding, linear and shared ones stay native)."""
    return type(layer) is DynamicLayer


def _instead(layers: list[Any]) -> str:
    """The end of the sentence that refuses a model without layers of plain full attention: what it has instead."""
    if any(isinstance(layer, LinearAttentionLayer) and isinstance(layer, DynamicLayer) for layer in layers):
        return " by itself: its layers hold a recurrent state and keys together, which kvote does not take apart"
    if any(isinstance(layer, DynamicIndexedLayer) for layer in layers):
        return ": an indexer of its own selects the tokens that it reads, so there is nothing for kvote to manage"
    return ", so there is nothing for kvote to manage"
