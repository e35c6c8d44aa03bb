"""How far the layers of a cache have come: all equally far, unless a pass was interrupted between two of them."""

from typing import Any, Protocol

from kvote.errors import CropError, InterruptedPassError
from kvote.hf.cache_layer import CacheLayer, check_native_crop, columns_of
from kvote.layer import Layer
from kvote.passes import Passes


class Layered(Protocol):
    """A cache, as far as it matters here. ``counting``: which layers count columns; ``states``: which hold states that
    every pass overwrites. ``managed``: kvote's layers."""

    layers: list[Any]
    passes: Passes
    counting: list[int]
    states: list[int]

    @property
    def managed(self) -> list[Layer]: ...
    def get_seq_length(self) -> int: ...


def ended(cache: Layered) -> bool:
    """Whether the last pass has reached the last layer, as far as layers that do not count can tell."""
    return not cache.states or cache.passes.reached in (None, max(*cache.states, *cache.counting))


def agree(cache: Layered) -> bool:
    """Whether all layers between which a pass may have ended hold equally many columns."""
    first, last = cache.counting[0], cache.counting[-1]
    return first == last or bool(cache.layers[first].get_seq_length() == cache.layers[last].get_seq_length())


def fewest(cache: Layered) -> int:
    """Columns of the layer that holds fewest."""
    return min(columns_of(cache.layers[index]) or 0 for index in cache.counting)


def holds(cache: Layered, columns: int) -> bool:
    """Whether every layer holds ``columns`` columns, as after a pass that was not interrupted."""
    whole = ended(cache) and not cache.passes.corrupt and all(part.seen == columns for part in cache.managed)
    return whole and all(columns_of(cache.layers[index]) == columns for index in cache.counting)


def check_agreement(cache: Layered) -> None:
    """Raises InterruptedPassError if layers hold different numbers of columns."""
    if not agree(cache):
        first, last = (columns_of(cache.layers[cache.counting[i]]) for i in (0, -1))
        raise InterruptedPassError(
            f"The last pass was interrupted and has left layers with {last} to {first} columns; {_way_back(cache)}."
        )


def check_crop(cache: Layered, columns: int) -> None:
    """Raises CropError or InterruptedPassError if some layer cannot be cut to its first ``columns``."""
    if not ended(cache):
        raise InterruptedPassError(
            "An interrupted pass has left native layers with states that cannot be taken back; call cache.reset() "
            "and feed the text again."
        )
    for layer in cache.layers:
        own = columns_of(layer)
        if own is not None and own < columns:
            raise InterruptedPassError(
                f"An interrupted pass has left layers with {fewest(cache)} to {cache.get_seq_length()} columns, so "
                f"none can be cut to {columns}; {_way_back(cache)}."
            )
        if isinstance(layer, CacheLayer):
            for part in layer.layer.parts:
                part.check_crop(part.seen - columns)
        else:
            check_native_crop(layer, columns - (cache.get_seq_length() if own is None else own))


def _way_back(cache: Layered) -> str:
    """How to go on after an interruption."""
    least, encoded = fewest(cache), max(max(part.encoded, part.shown) for part in cache.managed)
    try:
        check_crop(cache, least)
    except (CropError, InterruptedPassError):
        encoded = least + 1
    if cache.states or encoded > least:
        return "call cache.reset() and feed the text again"
    return f"call cache.crop({least - cache.get_seq_length()}) to go back to {least}, or cache.reset()"
