"""How many tokens a layer can hold within a budget of bytes."""

from typing import TYPE_CHECKING

from kvote.errors import MethodError
from kvote.keep.budget import Budget

if TYPE_CHECKING:
    from kvote.layer import Layer


def affordable(layer: "Layer", dial: Budget) -> int:
    """Tokens of each sequence that a budget of bytes has room for."""
    assert layer.segment is not None
    return layer.segment.tokens_within(dial.amount / layer.layers, layer.method.keep.token_bytes)


def check_budget(layer: "Layer") -> None:
    """Raises MethodError if a budget of bytes leaves no page of tokens to a key head."""
    dial = layer.method.keep.budget
    if dial is not None and dial.unit == "bytes" and affordable(layer, dial) < 1:
        raise MethodError(
            f"{layer.method.spec}: {dial.amount:,.0f} bytes for {layer.layers:g} layers and {layer.sequences} "
            "sequences leave no page of tokens to a key head; give a larger budget."
        )
