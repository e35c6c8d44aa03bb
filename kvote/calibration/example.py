"""Calibrations that nobody measured: of the right form, to build methods with where no model is at hand."""

from kvote.calibration.file import Calibration
from kvote.calibration.fingerprint import Fingerprint

_SMALL = Fingerprint("example", 1, 2, 2, 2, (0.0,))


def example(kind: str, model: Fingerprint = _SMALL) -> Calibration:
    """One of that kind for ``model``. In every layer, earlier key heads matter more, and so do earlier channels."""
    falling = [1 - head / model.kv_heads for head in range(model.kv_heads)]
    queries = [1 - head / model.heads for head in range(model.heads)]
    layer: object = {
        "channels": [list(range(model.head_dim))] * model.kv_heads,
        "razor": {"echo": falling, "induction": falling},
        "duo": {"gate": falling},
        "rotated": list(range(model.kv_heads * model.head_dim)),
        "semantic": {"span": queries, "error": 1 / model.layers},
        "patterns": [["vertical_slash", 1000, 6096]] * model.heads,
    }[kind]
    more = {"heads": 4} if kind == "rotated" else {}
    return Calibration(kind, model, {"tokens": 1, **more, "layers": {str(i): layer for i in range(model.layers)}})


def examples() -> list[Calibration]:
    """One of every kind."""
    return [example(kind) for kind in ("channels", "razor", "duo", "rotated", "semantic", "patterns")]
