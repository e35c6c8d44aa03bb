"""Whether a document fits into memory, foreseen before it is read."""

from transformers import PreTrainedModel

from kvote.document import TOKENS_PER_PASS
from kvote.env import memory
from kvote.errors import InputError
from kvote.method import Method
from kvote.peak import peak_bytes, shape_of

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
    """The most that the cache holds at a time; 0 where the config does not tell."""
    shape = shape_of(model)
    return 0 if shape is None else peak_bytes(method, shape, tokens, tokens_per_pass=TOKENS_PER_PASS)
