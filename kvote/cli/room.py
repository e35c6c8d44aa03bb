"""Whether a document fits into memory, foreseen before it is read."""

from transformers import PreTrainedModel

from kvote.env import memory
from kvote.errors import InputError
from kvote.method import Method

_GIB = 2**30


def check_memory(model: PreTrainedModel, method: Method, tokens: int) -> None:
    """Raises InputError if the keys and values of ``tokens`` tokens cannot fit into the memory that is free."""
    needed, free = _peak_bytes(model, method, tokens), memory()[1]
    if model.device.type == "cpu" and free and needed > free:
        raise InputError(
            f"{tokens:,} tokens of document and answer need {gib(needed)} GiB for keys and values with {method.spec}, "
            f"and {gib(free)} GiB are free; give fewer tokens or a method that drops some, such as streamingllm."
        )


def gib(size: int) -> str:
    """GiB with a decimal, exact however large."""
    tenths = size * 10 // _GIB
    return f"{tenths // 10:,}.{tenths % 10}"


def _peak_bytes(model: PreTrainedModel, method: Method, tokens: int) -> int:
    """The most that the cache holds at a time. The one place that foresees it."""
    return 0 if method.keep.drops else tokens * _token_bytes(model)


def _token_bytes(model: PreTrainedModel) -> int:
    """Bytes that one token takes in all layers together, 0 where the config does not say."""
    config = model.config.get_text_config(decoder=True)
    layers, heads = (getattr(config, name, 0) or 0 for name in ("num_hidden_layers", "num_attention_heads"))
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or (getattr(config, "hidden_size", 0) // heads if heads else 0)
    position = 4
    return int(layers * key_heads * (2 * dim * model.dtype.itemsize + position))
