"""Scores of key heads, by which methods tell those that look far back from the rest.

``data``: {..., "layers": {"layer": {"score": [of key head 0, of key head 1, ...], ...}, ...}}, every score from 0 to 1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kvote.calibration.file import Calibration, is_layer, shown
from kvote.errors import InputError

# Kinds of calibration, and the scores that each gives a head.
RAZOR, DUO = "razor", "duo"
SCORES = {RAZOR: ("induction", "echo"), DUO: ("gate",)}
_DIGITS = 6


def scores_of(calibration: Calibration, kind: str) -> dict[str, dict[int, tuple[float, ...]]]:
    """By name and layer: the scores of its key heads. Raises InputError unless all are there and make sense."""
    name, model, layers = calibration.name, calibration.model, calibration.data.get("layers")
    if calibration.kind != kind or not isinstance(layers, dict) or not layers:
        raise InputError(f"{name} holds no layers with scores of heads ({kind}).")
    found: dict[str, dict[int, tuple[float, ...]]] = {score: {} for score in SCORES[kind]}
    for layer, scores in layers.items():
        if not is_layer(layer, model.layers) or not isinstance(scores, dict) or set(scores) != set(found):
            raise InputError(f"{name}: layer {shown(layer)} is not one of the model's with {' and '.join(found)}.")
        for score, heads in scores.items():
            if not isinstance(heads, list) or len(heads) != model.kv_heads or not all(map(_is_share, heads)):
                raise InputError(f"{name}: {score} of layer {layer} is not {model.kv_heads} numbers from 0 to 1.")
            found[score][int(layer)] = tuple(map(float, heads))
    return found


def as_data(scores: Mapping[int, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """The "layers" of a file, from scores by layer and name. Raises InputError where one is not finite."""
    for layer, heads in scores.items():
        if not all(math.isfinite(score) for each in heads.values() for score in each):
            raise InputError(f"Layer {layer} gave numbers that are not finite; load the model in a wider precision.")
    return {
        str(layer): {name: [_share(score) for score in each] for name, each in scores[layer].items()}
        for layer in sorted(scores)
    }


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _share(score: float) -> float:
    # Sums of rounded weights may end a little beside their bounds.
    return round(min(max(score, 0.0), 1.0), _DIGITS)
