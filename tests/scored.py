"""Calibrations with scores of heads as a test wants them."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from kvote.calibration import Calibration, Fingerprint, save
from kvote.calibration.heads import DUO, RAZOR
from kvote.calibration.spans import SEMANTIC

Heads = list[list[float]]


def razor(net: Any, induction: Heads, echo: Heads | None = None) -> Calibration:
    """``induction`` and ``echo`` of the key heads, by layer."""
    echo = [[0.0] * len(heads) for heads in induction] if echo is None else echo
    layers = {str(i): {"induction": a, "echo": b} for i, (a, b) in enumerate(zip(induction, echo, strict=True))}
    return Calibration(RAZOR, Fingerprint.of(net), {"tokens": 9, "layers": layers})


def duo(net: Any, gates: Heads) -> Calibration:
    layers = {str(layer): {"gate": heads} for layer, heads in enumerate(gates)}
    return Calibration(DUO, Fingerprint.of(net), {"steps": 9, "layers": layers})


def semantic(net: Any, spans: Heads, errors: list[float]) -> Calibration:
    """``spans`` of the query heads, and the ``errors``, by layer."""
    layers = {str(i): {"span": a, "error": b} for i, (a, b) in enumerate(zip(spans, errors, strict=True))}
    return Calibration(SEMANTIC, Fingerprint.of(net), {"tokens": 9, "layers": layers})


@cache
def _folder() -> Path:
    return Path(mkdtemp(prefix="kvote-heads-"))


def file(calibration: Calibration) -> str:
    """Where it lies, for methods that are written as a spec."""
    path = _folder() / f"{calibration.kind}-{abs(hash(calibration.model))}.json"
    save(calibration, path)
    return str(path)


def written(net: Any, spec: str) -> str:
    """A spec in which "{razor}", "{duo}" and "{semantic}" stand for calibrations of a model of two layers with two key
    heads, in each of which one keeps everything and one does not."""
    scores = [[0.1, 0.9], [0.8, 0.2]]
    spans = [[1 / (1 + head) for head in range(net.config.num_attention_heads)]] * 2
    for made in (razor(net, scores), duo(net, scores), semantic(net, spans, [0.7, 0.3])):
        spec = spec.replace(f"{{{made.kind}}}", file(made))
    return spec
