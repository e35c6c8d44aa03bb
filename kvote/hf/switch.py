"""The switch to kvote's attention functions, and back."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel

from kvote.hf.attention import attention
from kvote.hf.mask import mask

_PREFIX = "kvote_over_"


class AttentionName(str):
    """The name of kvote's functions over those called ``native``; it equals both names.

    transformers finds an attention function by its name, and continuous batching and some models ask whether that name
    is "sdpa" or "eager". Functions are found by hash, so under this name kvote's; who compares is told the native name.
    Pickled, it is the native name, so that a saved model opens without kvote.
    """

    native: str

    def __new__(cls, native: str) -> "AttentionName":
        # "flash" in a name makes transformers look for a kernel of that name.
        name = super().__new__(cls, _PREFIX + native.replace("flash_attention_", "fa"))
        name.native = native
        return name

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == self.native

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionName":
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.native,)


def attach(model: PreTrainedModel) -> None:
    """Switches ``model`` to kvote's attention; with any other cache it behaves as before."""
    for config in _configs(model):
        native = config._attn_implementation or "eager"
        if isinstance(native, AttentionName):
            continue
        name = AttentionName(native)
        AttentionInterface.register(name, partial(attention, native))
        AttentionMaskInterface.register(name, partial(mask, native))
        # set_attn_implementation would find the name equal to the native one and leave it.
        config._attn_implementation_internal = name


def switch_back(model: PreTrainedModel) -> None:
    """Gives ``model``, and all that share its configs, their own attention back."""
    for config in _configs(model):
        if isinstance(config._attn_implementation, AttentionName):
            config._attn_implementation_internal = config._attn_implementation.native


def is_attached(model: PreTrainedModel) -> bool:
    """Whether some part of ``model`` has been switched."""
    return any(isinstance(config._attn_implementation, AttentionName) for config in _configs(model))


@contextlib.contextmanager
def names_kept_on_failure(model: PreTrainedModel) -> Iterator[None]:
    """Where the block raises, the attention of all parts is what it was before."""
    names = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        yield
    except BaseException:
        for config, name in names:
            config._attn_implementation_internal = name
        raise


def _configs(model: PreTrainedModel) -> Iterator[Any]:
    """The configs that the parts of ``model`` go by, each once."""
    met: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig) and id(config) not in met:
            met.add(id(config))
            yield config
