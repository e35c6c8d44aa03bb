"""The fuller the memory, the less of a text stays."""

from dataclasses import dataclass
from typing import Any

from kvote.errors import MethodError
from kvote.keep.budget import whole
from kvote.keep.keeper import Held
from kvote.numbers import is_number


@dataclass(frozen=True)
class MemoryPressure:
    """The share of a text that is dropped grows with the memory in use: it is ``goes``, plus ``alpha`` times the part
    of ``total`` bytes that all layers hold of all sequences (counted in the model's dtype), at most ``most`` unless
    ``goes`` is more. ``least``: tokens that stay in any case; ``always``: tokens that are not counted among the divided
    ones."""

    goes: float
    alpha: float
    most: float
    total: float
    least: int
    always: int
    cascades: bool = False
    per_layer: bool = False

    def __post_init__(self) -> None:
        for name in ("goes", "alpha", "most"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise MethodError(f"{name} must be a share from 0 to 1; got {value!r}.")

    def margin(self, layers: int) -> int:
        return 0

    def tokens(self, held: Held, memory: Any, mean: int) -> int:
        key, value = held.segment.decode([held.row], 0, 1)
        used = held.segment.sequences * held.length * held.layers * (key.numel() + value.numel()) * key.element_size()
        return max(self.least, whole((1 - self.share(used)) * held.seen)) - self.always

    def share(self, used: float) -> float:
        """The share that is dropped while ``used`` bytes are held."""
        return max(self.goes, min(self.goes + self.alpha * used / self.total, self.most))
