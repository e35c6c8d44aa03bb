"""Models that throw a cache away in the middle of a text are stopped where they would.

Models with LongRoPE rotate every key anew once a text passes a length, and so their ``prepare_inputs_for_generation``
leaves the cache out there and the text is read again into another one: kvote's would stand still without a word.
"""

import inspect
import weakref
from typing import Any

import torch

from kvote.errors import UnsupportedModelError
from kvote.hf.cache_layer import CacheLayer
from kvote.hf.model import innermost, name_of
from kvote.hf.recording import RecordedCache

_NAME, _TRAINED = "prepare_inputs_for_generation", "original_max_position_embeddings"


def throws_away(model: Any) -> int | None:
    """The length of text behind which ``model`` leaves its cache out; None if it keeps it. Found out by asking it."""
    prepare: Any = getattr(model, _NAME, None)
    for length in _lengths(model.config.get_text_config(decoder=True)) if prepare is not None else ():
        ids = torch.zeros(1, length + 1, dtype=torch.int64)
        cache = RecordedCache(config=model.config)
        try:
            inputs = prepare(ids, past_key_values=cache, attention_mask=torch.ones_like(ids))
        except Exception:  # What it cannot prepare on its own, it will refuse in generate() too.
            continue
        if inputs.get("past_key_values") is None:
            return length
    return None


def switches_at(model: Any) -> int | None:
    """Tokens up to which a model with LongRoPE uses its short factors; None for a model without it."""
    config = model.config.get_text_config(decoder=True)
    lengths = _lengths(config)
    longrope = any(rotation.get("rope_type") == "longrope" for rotation in _rotations(config))
    return lengths[0] if lengths and longrope else None


def _lengths(config: Any) -> list[int]:
    """Lengths up to which a config says that a model was first trained."""
    named = [getattr(config, _TRAINED, None), *(rotation.get(_TRAINED) for rotation in _rotations(config))]
    return sorted({n for n in named if isinstance(n, int) and 0 < n < 1 << 24})


def _rotations(config: Any) -> list[dict[str, Any]]:
    """The rotation that a config tells, or those of each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [each for each in (rope, *rope.values()) if isinstance(each, dict)]


class Guard:
    """Stands before the ``prepare_inputs_for_generation`` of a model, and goes with a copy of the model."""

    def __init__(self, model: Any, length: int) -> None:
        self.model, self.length = weakref.ref(model), length

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own())

    def _own(self) -> Any:
        model = self.model()
        return getattr(type(model), _NAME).__get__(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("past_key_values")
        inputs = self._own()(*args, **kwargs)
        ours = any(isinstance(layer, CacheLayer) for layer in getattr(given, "layers", ()))
        if ours and inputs.get("past_key_values") is None:
            raise UnsupportedModelError(
                f"{name_of(self.model())} rotates keys otherwise in texts of more than {self.length} tokens, and would "
                "throw the cache away here and read the text again; stay below that length, or read more into "
                "the cache before generate() is called."
            )
        return inputs

    def __getstate__(self) -> tuple[Any, int]:
        return self.model(), self.length

    def __setstate__(self, state: tuple[Any, int]) -> None:
        self.model, self.length = weakref.ref(state[0]), state[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guard":
        return Guard(memo.get(id(self.model()), self.model()), self.length)


def guard(model: Any, length: int | None) -> None:
    """Lets ``model`` raise UnsupportedModelError where it would leave a kvote cache out, behind ``length`` tokens; None
    ends it."""
    inner = innermost(model)
    if isinstance(vars(inner).get(_NAME), Guard):
        del vars(inner)[_NAME]
    if length is not None and _NAME not in vars(inner):
        vars(inner)[_NAME] = Guard(inner, length)
