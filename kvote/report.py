"""The report of a cache, for people and for JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from kvote.byte_budget import budget_of
from kvote.heads import HeadGroups
from kvote.hf.cache_layer import CacheLayer
from kvote.layer import Layer
from kvote.store.offloaded import OffloadedSegment


@dataclass(frozen=True)
class LayerReport:
    """One layer. ``tokens_held`` is the sum over sequences, ``tokens_read`` what the latest query read; ``budget``:
    tokens that the longest sequence may hold now (while generating, it may hold fewer for a few steps), None for no
    limit. Of tokens on a disk: the bytes that lie there, and all that were fetched so far."""

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
    disk_nbytes: int = 0
    disk_read: int = 0

    @classmethod
    def of(cls, index: int, parts: Sequence[Layer]) -> "LayerReport":
        """The report of a layer, or of all groups of its key heads: the largest count of tokens, the sum of what they
        did."""
        acts = [part.activity for part in parts]
        spills = [part.segment.disk.spill for part in parts if isinstance(part.segment, OffloadedSegment)]
        budgets = [b for part in parts for row in range(part.sequences) if (b := budget_of(part, row)) is not None]
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
            disk_nbytes=sum(spill.nbytes for spill in spills),
            disk_read=sum(spill.read for spill in spills),
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
        """Sentences on what the figures do not show, such as that a method that drops tokens had no reason to."""
        limits = [layer.budget for layer in self.layers if layer.budget is not None]
        seen = max((layer.tokens_seen for layer in self.layers), default=0)
        if not limits or any(layer.dropped for layer in self.layers) or seen > min(limits):
            return []
        return [f"Nothing has been dropped: up to {min(limits):,} tokens stay, and {seen:,} were seen."]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "notes": self.notes}

    def __str__(self) -> str:
        names = list(LayerReport.__dataclass_fields__)
        if not any(layer.disk_nbytes or layer.disk_read for layer in self.layers):
            names = [name for name in names if not name.startswith("disk_")]
        rows = [names] + [[str(getattr(layer, name)) for name in names] for layer in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        head = f"{self.method}: {self.nbytes:,} bytes, {self.peak_nbytes:,} at the peak"
        return "\n".join([f"{head}; trial of the model {self.trial_seconds:.2g} s", *lines, *self.notes])


def report_of(
    method: str, layers: Sequence[Layer | HeadGroups], nbytes: int, peak: int, trial_seconds: float
) -> Report:
    """That of a cache whose ``layers`` hold something. ``peak``: the most bytes that these have held."""
    each = [LayerReport.of(layer.index, layer.parts) for layer in layers]
    beside = nbytes - sum(layer.nbytes for layer in each)
    return Report(method, each, nbytes, max(nbytes, peak + beside), trial_seconds)


def nbytes_of(layers: Sequence[Any]) -> int:
    """Bytes that all layers of a cache hold, native ones too, and their rotations."""
    parts = [part for layer in layers if isinstance(layer, CacheLayer) for part in layer.layer.parts]
    ropes = {id(part.rope): part.rope.nbytes for part in parts if part.rope is not None}
    return sum(map(_layer_nbytes, layers)) + sum(ropes.values())


def _layer_nbytes(layer: Any) -> int:
    if isinstance(layer, CacheLayer):
        return layer.layer.nbytes
    held = [value for value in vars(layer).values() if isinstance(value, Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)
