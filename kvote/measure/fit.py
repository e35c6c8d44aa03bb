"""Whether a model, its weights and its cache, fits into the memory of this machine."""

from dataclasses import dataclass

from kvote.env import memory
from kvote.measure.forecast import Machine, Prediction, reading_bytes
from kvote.measure.shape import Shape
from kvote.method import Method

_GIB = 2**30


@dataclass(frozen=True)
class Fit:
    """Bytes of the ``weights`` and of the ``cache`` once a prompt has been read, and at the most meanwhile
    (``reading``); of the memory in all and that is free now, both 0 where the system does not say."""

    weights: int
    cache: int
    reading: int
    total: int
    free: int

    @property
    def fits(self) -> bool | None:
        """At its worst; None where nobody knows how much memory there is."""
        return self.weights + self.reading <= self.total if self.total else None

    def __str__(self) -> str:
        weights, cache, reading, total, free = map(
            _size, (self.weights, self.cache, self.reading, self.total, self.free)
        )
        needs = f"weights of {weights} and a cache of {cache}"
        if self.reading > self.cache:
            needs += f" (up to {reading} while the prompt is read)"
        if not self.total:
            return f"It takes {needs}; this system does not say how much memory it has."
        if not self.fits:
            return f"It does not fit: {needs}, and this machine has {total}."
        later = f", of which {free} are free now" if self.free and self.weights + self.reading > self.free else ""
        return f"It fits: {needs}, and this machine has {total}{later}."


def fit(model: Shape, prediction: Prediction, method: Method, machine: Machine) -> Fit:
    """The memory and time that the model takes with ``method`` on this machine. Layers that are not kvote's hold at
    most their window."""
    window = min(prediction.context, model.window or 0)
    others = model.others * prediction.batch * window * model.geometry.token_bytes
    held, total = prediction.method.held_bytes, memory()
    reading = reading_bytes(model, prediction.context, method, machine)
    return Fit(model.resident_bytes, held + others, reading + others, *total)


def _size(count: int) -> str:
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB / 10 else f"{count / 2**20:,.1f} MiB"
