"""How many tokens a layer may hold within its budget."""

from kvote.errors import MethodError
from kvote.keep.budget import Budget
from kvote.layer_state import LayerState


def affordable(layer: LayerState, dial: Budget) -> int:
    """Tokens of each sequence that a budget of bytes has room for."""
    assert layer.segment is not None
    return layer.segment.tokens_within(dial.amount / layer.layers, layer.method.keep.token_bytes)


def budget_of(layer: LayerState, row: int) -> int | None:
    """How many tokens a sequence may hold now, at least one, or None for no limit."""
    dial = layer.method.keep.budget
    if dial is None or layer.segment is None:
        return None
    if dial.unit != "bytes":
        return dial.tokens(layer.tokens_seen(row))
    # Once there are tokens, a budget that no longer suffices (copies were made) must not end a pass half way.
    return max(1, affordable(layer, dial))


def check_budget(layer: LayerState) -> None:
    """Raises MethodError if a budget of bytes leaves no page of tokens to a key head."""
    dial = layer.method.keep.budget
    if dial is not None and dial.unit == "bytes" and affordable(layer, dial) < 1:
        raise MethodError(
            f"{layer.method.spec}: {dial.amount:,.0f} bytes for {layer.layers:g} layers and {layer.sequences} "
            "sequences leave no page of tokens to a key head; give a larger budget."
        )
