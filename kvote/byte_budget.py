"""How many tokens a layer may hold within its budget."""

from kvote.errors import MethodError
from kvote.keep.budget import Budget
from kvote.layer_state import LayerState


def tokens_in_budget(layer: LayerState, limit: Budget) -> int:
    """Tokens of each sequence that a budget of bytes has room for."""
    assert layer.segment is not None
    return layer.segment.tokens_within(limit.amount / layer.layers, layer.method.keep.token_bytes)


def budget_of(layer: LayerState, row: int) -> int | None:
    """How many tokens a sequence may hold now, at least one, or None for no limit."""
    limit = layer.method.keep.budget
    if limit is None or layer.segment is None:
        return None
    if limit.unit != "bytes":
        return limit.tokens(layer.tokens_seen(row))
    # Once there are tokens, a budget that no longer suffices (copies were made) must not end a pass half way.
    return max(1, tokens_in_budget(layer, limit))


def check_budget(layer: LayerState) -> None:
    """Raises MethodError if a budget of bytes leaves no page of tokens to a key head."""
    limit = layer.method.keep.budget
    if limit is not None and limit.unit == "bytes" and tokens_in_budget(layer, limit) < 1:
        raise MethodError(
            f"{layer.method.spec}: {limit.amount:,.0f} bytes for {layer.layers:g} layers and {layer.sequences} "
            "sequences leave no page of tokens to a key head; give a larger budget."
        )
