"""Calibrations that nobody measured: of the right form, to build methods with where no model is at hand."""

from kvote.calibration.file import Calibration
from kvote.calibration.fingerprint import Fingerprint

_SMALL = Fingerprint("example", 1, 2, 2, 2, (0.0,))


def example(kind: str, model: Fingerprint = _SMALL) -> Calibration:
    """One of that kind for ``model``. In every layer, earlier key heads matter more, and so do earlier channels."""
    falling = [1 - head / model.kv_heads for head in range(model.kv_heads)]
    layer: object = {
        "channels": [list(range(model.head_dim))] * model.kv_heads,
        "razor": {"echo": falling, "induction": falling},
        "duo": {"gate": falling},
        "patterns": [["vertical_slash", 1000, 6096]] * model.heads,
    }[kind]
    return Calibration(kind, model, {"tokens": 1, "layers": {str(i): layer for i in range(model.layers)}})


def examples() -> list[Calibration]:
    """One of every kind."""
    return [example(kind) for kind in ("channels", "razor", "duo", "patterns")]
