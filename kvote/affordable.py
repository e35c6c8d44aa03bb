"""How many tokens a layer can hold within a budget of bytes."""

from kvote.errors import MethodError
from kvote.keep.budget import Budget
from kvote.layer_state import LayerState


def affordable(layer: LayerState, dial: Budget) -> int:
    """Tokens of each sequence that a budget of bytes has room for."""
    assert layer.segment is not None
    return layer.segment.tokens_within(dial.amount / layer.layers, layer.method.keep.token_bytes)


def check_budget(layer: LayerState) -> None:
    """Raises MethodError if a budget of bytes leaves no page of tokens to a key head."""
    dial = layer.method.keep.budget
    if dial is not None and dial.unit == "bytes" and affordable(layer, dial) < 1:
        raise MethodError(
            f"{layer.method.spec}: {dial.amount:,.0f} bytes for {layer.layers:g} layers and {layer.sequences} "
            "sequences leave no page of tokens to a key head; give a larger budget."
        )
