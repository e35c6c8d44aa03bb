"""What a cache did and holds, for people and for JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvote.hf.cache_layer import CacheLayer
from kvote.layer import Layer

if TYPE_CHECKING:
    from kvote.cache import Cache


@dataclass(frozen=True)
class LayerReport:
    """One layer. ``tokens_held`` is the sum over sequences, ``tokens_read`` what the latest query read; ``budget``:
    tokens that the longest sequence may hold now (while generating, it may hold fewer for a few steps), None for no
    limit."""

    layer: int
    tokens_seen: int
    tokens_held: int
    tokens_read: int
    selections: int
    reused: int
    dropped: int
    calls: int
    nbytes: int
    budget: int | None

    @classmethod
    def of(cls, index: int, parts: Sequence[Layer]) -> "LayerReport":
        """Of a layer, or of all groups of its key heads: of tokens the largest count, of what they did the sum."""
        acts = [part.activity for part in parts]
        budgets = [b for part in parts for row in range(part.sequences) if (b := part.budget(row)) is not None]
        return cls(
            layer=index,
            tokens_seen=parts[0].seen,
            tokens_held=max(part.held for part in parts),
            tokens_read=max(act.tokens_read for act in acts),
            selections=int(sum(act.selections for act in acts)),
            reused=int(sum(act.reused for act in acts)),
            dropped=sum(act.dropped for act in acts),
            calls=max(act.calls for act in acts),
            nbytes=sum(part.nbytes for part in parts),
            budget=max(budgets) if budgets else None,
        )


@dataclass(frozen=True)
class Report:
    """All layers managed by kvote, and the bytes of the whole cache: now, and the most since it was empty. The peak is
    taken at the ends of passes, where most is held; while generating, every 64 tokens."""

    method: str
    layers: list[LayerReport]
    nbytes: int
    peak_nbytes: int
    # What finding out about the model took, once for all its caches.
    trial_seconds: float

    @property
    def notes(self) -> list[str]:
        """What figures do not say by themselves, in sentences: that a method which drops tokens had no reason to."""
        limits = [layer.budget for layer in self.layers if layer.budget is not None]
        seen = max((layer.tokens_seen for layer in self.layers), default=0)
        if not limits or any(layer.dropped for layer in self.layers) or seen > min(limits):
            return []
        return [f"Nothing has been dropped: up to {min(limits):,} tokens stay, and {seen:,} were seen."]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "notes": self.notes}

    def __str__(self) -> str:
        names = list(LayerReport.__dataclass_fields__)
        rows = [names] + [[str(getattr(layer, name)) for name in names] for layer in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        head = f"{self.method}: {self.nbytes:,} bytes, {self.peak_nbytes:,} at the peak"
        return "\n".join([f"{head}; trial of the model {self.trial_seconds:.2g} s", *lines, *self.notes])


def report_of(cache: "Cache") -> Report:
    """That of a cache that holds something."""
    layers = [LayerReport.of(layer.index, layer.parts) for layer in cache.own]
    nbytes, own = cache.nbytes(), sum(layer.nbytes for layer in layers)
    peak = max(nbytes, cache.passes.peak + nbytes - own)
    return Report(cache.method.spec, layers, nbytes, peak, cache.trial_seconds)


def nbytes_of(cache: "Cache") -> int:
    """Bytes that all layers of a cache hold, native ones too, and their rotations."""
    ropes = {id(layer.rope): layer.rope.nbytes for layer in cache.managed if layer.rope is not None}
    return sum(map(_layer_nbytes, cache.layers)) + sum(ropes.values())


def _layer_nbytes(layer: Any) -> int:
    if isinstance(layer, CacheLayer):
        return layer.layer.nbytes
    held = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)
