"""Scores of query heads that find answers, and the error of each layer when little of a prompt is kept.

``data``: {"tokens": read, "layers": {"layer": {"span": [of query head 0, ...], "error": share of all layers'}, ...}}.
"""

from typing import Any

from kvote.calibration.file import Calibration, is_layer, shown
from kvote.errors import InputError
from kvote.numbers import is_number

SEMANTIC = "semantic"


def facts_of(calibration: Calibration) -> tuple[dict[int, tuple[float, ...]], dict[int, float]]:
    """By layer, the scores of its query heads, and its share of the error. Raises InputError for what makes no
    sense."""
    name, model, layers = calibration.name, calibration.model, calibration.data.get("layers")
    if calibration.kind != SEMANTIC or not isinstance(layers, dict) or not layers:
        raise InputError(f"{name} holds no layers with scores of query heads ({SEMANTIC}).")
    spans: dict[int, tuple[float, ...]] = {}
    errors: dict[int, float] = {}
    for layer, held in layers.items():
        if not is_layer(layer, model.layers) or not isinstance(held, dict) or set(held) != {"span", "error"}:
            raise InputError(f"{name}: layer {shown(layer)} is not one of the model's with span and error.")
        heads = held["span"]
        if not isinstance(heads, list) or len(heads) != model.heads or not all(map(_is_positive, heads)):
            raise InputError(f"{name}: span of layer {layer} is not {model.heads} numbers of at least 0.")
        if not _is_positive(held["error"]):
            raise InputError(f"{name}: error of layer {layer} is not a number of at least 0.")
        spans[int(layer)], errors[int(layer)] = tuple(map(float, heads)), float(held["error"])
    return spans, errors


def best_heads(scores: tuple[float, ...], count: int) -> tuple[int, ...]:
    """The ``count`` heads with the largest scores, ascending; of equal ones the first."""
    return tuple(sorted(sorted(range(len(scores)), key=lambda head: -scores[head])[:count]))


def _is_positive(value: Any) -> bool:
    return is_number(value) and value >= 0
