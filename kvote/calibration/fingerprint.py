"""Fingerprint: which model a calibration belongs to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvote.calibration.weights import matrices
from kvote.errors import UnsupportedModelError

# Weights that are sampled: a number of matrices, evenly spaced over the decoder, and a number of values of each.
_MATRICES, _NUMBERS = 16, 3
# Numbers of a matrix that tell how large its weights are.
_SCALED_BY = 256
_DIGITS = 3
# How far weights may differ that are the same, by their own size or the scale of their matrix, and on top of that:
# bfloat16 rounds by up to 0.2%, a sample by up to 0.5%, and float16 has nothing below 6e-8.
_TOLERANCE, _TINY = 0.01, 1e-7
# Numbers in a sample, at most: of each matrix its scale and some weights.
LONGEST = _MATRICES * (1 + _NUMBERS)
# What configs say about rotary positions; those of today all in the first.
_ROPE = ("rope_parameters",)
_OLD_ROPE = ("rope_theta", "rope_scaling", "rotary_emb_base", "rotary_pct", "partial_rotary_factor", "rotary_dim")

Rope = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Fingerprint:
    """Shape of a model's attention, how it rotates (``rope``: names and values of what its config says, sorted), and a
    ``sample`` of its weights, rounded: of some matrices the scale of what they hold, and a few numbers.

    Models are compared with a tolerance (``difference``), so that one may be loaded in other precisions than the one it
    was calibrated in. A fine-tuned model is another model, unless it changed by less than that; its vocabulary does not
    count.
    """

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    sample: tuple[float, ...]
    rope: Rope = ()

    @classmethod
    def of(cls, model: Any) -> "Fingerprint":
        """The fingerprint of a ``PreTrainedModel``, wrapped by PEFT or not. Raises UnsupportedModelError where its
        config does not say what its attention is, or its weights cannot be read."""
        config = model.config.get_text_config(decoder=True)
        heads, layers = (_count(config, f"num_{of}") for of in ("attention_heads", "hidden_layers"))
        dim = getattr(config, "head_dim", None)
        return cls(
            model_type=str(config.model_type),
            layers=layers,
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(dim or _count(config, "hidden_size") // heads),
            sample=_sample(model),
            rope=_rope(config),
        )

    def difference(self, other: "Fingerprint") -> str | None:
        """The first difference that shows that ``other`` is another model's, as a clause; None if there is none."""
        for name in ("model_type", "layers", "heads", "kv_heads", "head_dim"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine!r} is {theirs!r} here"
        mine, theirs = dict(self.rope), dict(other.rope)
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                return f"{name} {mine.get(name, 'none')} is {theirs.get(name, 'none')} here"
        return None if _alike(self.sample, other.sample) else "of the same shape, but its weights differ"


def _count(config: Any, name: str) -> int:
    held = getattr(config, name, None)
    if not isinstance(held, int) or held < 1:
        raise UnsupportedModelError(f"The config of this {config.model_type} says no {name}; it cannot be calibrated.")
    return held


def _rope(config: Any) -> Rope:
    """What the config says about rotary positions, flat: nested names are joined with a dot."""
    names = _ROPE if getattr(config, _ROPE[0], None) else _OLD_ROPE
    found: dict[str, str] = {}
    for name in names:
        _flatten("" if name == _ROPE[0] else name, getattr(config, name, None), found)
    return tuple(sorted(found.items()))


def _flatten(name: str, value: Any, found: dict[str, str]) -> None:
    if isinstance(value, Mapping):
        for key, held in value.items():
            _flatten(f"{name}.{key}" if name else str(key), held, found)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        found[name] = " ".join(map(_written, value))
    elif value is not None:
        found[name] = _written(value)


def _written(value: Any) -> str:
    """A number to six digits, whether a config holds it as a whole one or not."""
    return f"{value:.6g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _sample(model: Any) -> tuple[float, ...]:
    found: list[float] = []
    for part in matrices(model, _MATRICES, _thinned):
        places = [(2 * j + 1) * len(part) // (2 * _NUMBERS) for j in range(_NUMBERS)]
        found += [float(part.double().square().mean().sqrt()), *part[places].tolist()]
    if not found:
        raise UnsupportedModelError("This model has no weights but embeddings; it cannot be calibrated.")
    return tuple(float(f"{number:.{_DIGITS}g}") for number in found)


def _thinned(weight: Tensor) -> Tensor:
    """Numbers of a weight, evenly spaced, in float32 on the CPU."""
    part = weight.flatten()[:: max(1, weight.numel() // _SCALED_BY)][:_SCALED_BY].float().cpu()
    # A file holds no others.
    return part.nan_to_num(0.0, 0.0, 0.0)


def _alike(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    size = 1 + _NUMBERS
    if len(one) != len(other):
        return False
    for start in range(0, len(one), size):
        scale = max(one[start], other[start])
        for a, b in zip(one[start : start + size], other[start : start + size], strict=True):
            if abs(a - b) > _TOLERANCE * max(abs(a), abs(b), scale) + _TINY:
                return False
    return True
