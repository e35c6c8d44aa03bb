"""Fingerprint: which model a calibration belongs to."""

from dataclasses import dataclass
from typing import Any

# Weights that are looked at: so many matrices, evenly spaced over the model, and so many numbers of each.
_MATRICES, _NUMBERS = 16, 3
# Numbers of a matrix that tell how large its weights are.
_SCALED_BY = 256
_DIGITS = 3
# How far weights may differ that are the same, by their own size or the scale of their matrix, and on top of that:
# bfloat16 rounds by up to 0.2%, a sample by up to 0.5%, and float16 has nothing below 6e-8.
_TOLERANCE, _TINY = 0.01, 1e-7
# Numbers in a sample, at most: of each matrix its scale and some weights.
LONGEST = _MATRICES * (1 + _NUMBERS)


@dataclass(frozen=True)
class Fingerprint:
    """Shape of a model's attention, and a ``sample`` of its weights, rounded: of some matrices the scale of what they
    hold, and a few numbers.

    Models are compared with a tolerance (``difference``), so that one may be loaded in other precisions than the one it
    was calibrated in. A fine-tuned model is another model, unless it changed by less than that.
    """

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    sample: tuple[float, ...]

    @classmethod
    def of(cls, model: Any) -> "Fingerprint":
        """That of a ``PreTrainedModel``."""
        config = model.config.get_text_config(decoder=True)
        heads = int(config.num_attention_heads)
        return cls(
            model_type=str(config.model_type),
            layers=int(config.num_hidden_layers),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            sample=_sample(model),
        )

    def difference(self, other: "Fingerprint") -> str | None:
        """What tells that ``other`` is the fingerprint of another model, as a clause; None if nothing does."""
        for name in ("model_type", "layers", "heads", "kv_heads", "head_dim"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine!r} is {theirs!r} here"
        return None if _alike(self.sample, other.sample) else "of the same shape, but its weights differ"


def _sample(model: Any) -> tuple[float, ...]:
    matrices = [weight for weight in model.parameters() if weight.dim() > 1 and weight.numel()]
    found: list[float] = []
    for i in range(min(_MATRICES, len(matrices))):
        weight = matrices[i * len(matrices) // min(_MATRICES, len(matrices))].detach()
        part = weight.flatten()[:: max(1, weight.numel() // _SCALED_BY)][:_SCALED_BY].float().cpu()
        # A file holds no others.
        part = part.nan_to_num(0.0, 0.0, 0.0)
        places = [(2 * j + 1) * len(part) // (2 * _NUMBERS) for j in range(_NUMBERS)]
        found += [float(part.double().square().mean().sqrt()), *part[places].tolist()]
    return tuple(float(f"{number:.{_DIGITS}g}") for number in found)


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
