"""What a cache did and holds, for people and for JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from kvote.layer import Layer


@dataclass(frozen=True)
class LayerReport:
    """One layer. ``tokens_held`` is the sum over sequences, ``tokens_read`` what the latest query read; ``budget``:
    tokens that the longest sequence may hold now, None for no limit."""

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
    def of(cls, layer: Layer) -> "LayerReport":
        held = 0 if layer.segment is None else sum(layer.segment.length(row) for row in range(layer.sequences))
        act = layer.activity
        budgets = [tokens for row in range(layer.sequences) if (tokens := layer.budget(row)) is not None]
        return cls(
            layer=layer.index,
            tokens_seen=layer.seen,
            tokens_held=held,
            tokens_read=act.tokens_read,
            selections=act.selections,
            reused=act.reused,
            dropped=act.dropped,
            calls=act.calls,
            nbytes=layer.nbytes,
            budget=max(budgets) if budgets else None,
        )


@dataclass(frozen=True)
class Report:
    """All layers managed by kvote, and the bytes of the whole cache."""

    method: str
    layers: list[LayerReport]
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        names = list(LayerReport.__dataclass_fields__)
        rows = [names] + [[str(getattr(layer, name)) for name in names] for layer in self.layers]
        widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([f"{self.method}: {self.nbytes:,} bytes", *lines])
