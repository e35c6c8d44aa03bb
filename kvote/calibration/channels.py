"""Which channels of a key decide its scores: the order of channels per layer and key head (Double Sparsity).

``data``: {"tokens": how many were measured, "layers": {"layer": [channels of key head 0, most important first], ...}}.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote.calibration.file import Calibration, is_layer, shown
from kvote.errors import InputError
from kvote.read.reader import ReaderDefaults, Reading, everything
from kvote.tokens import Span

KIND = "channels"


Order = tuple[tuple[int, ...], ...]


def order_of(calibration: Calibration) -> dict[int, Order]:
    """By layer: [kv_heads][head_dim], the channels of each key head, most important first.

    Raises InputError unless every one is an order of all channels.
    """
    model, layers = calibration.model, calibration.data.get("layers")
    if calibration.kind != KIND or not isinstance(layers, dict) or not layers:
        raise InputError(f"{calibration.name} holds no layers with an order of channels.")
    found = {}
    for name, heads in layers.items():
        if not is_layer(name, model.layers) or not isinstance(heads, list) or len(heads) != model.kv_heads:
            raise InputError(f"{calibration.name}: layer {shown(name)} is not one of the model's, or lacks key heads.")
        for order in heads:
            whole = isinstance(order, list) and len(order) == model.head_dim and all(type(i) is int for i in order)
            if not whole or sorted(order) != list(range(model.head_dim)):
                raise InputError(f"{calibration.name}: layer {name} is not an order of {model.head_dim} channels.")
        found[int(name)] = tuple(tuple(order) for order in heads)
    return found


@dataclass(frozen=True)
class ChannelProducts(ReaderDefaults):
    """Reads everything, and adds up |q_i * k_i| of each token's own query and key, rotated, over its query heads.

    ``sums``: by layer, float64 [kv_heads, head_dim].
    """

    sums: dict[int, Tensor] = field(default_factory=dict)

    def read(self, reading: Reading) -> Iterator[Span]:
        query = reading.queries.rotated.double()
        key = reading.segment.decode(reading.rows, reading.first, reading.first + reading.count)[0].double()
        b, heads, t, d = query.shape
        h = key.shape[1]
        # |q * k| summed over the query heads of a group is |k| times the sum of |q|.
        products = query.abs().reshape(b, h, heads // h, t, d).sum(dim=2) * key.abs()
        own = products.sum(dim=(0, 2)).cpu()
        self.sums[reading.layer] = self.sums.get(reading.layer, torch.zeros_like(own)) + own
        yield everything(reading)

    def data(self, tokens: int) -> dict[str, object]:
        """The facts of a calibration file; equal channels in their natural order."""
        ranked = {layer: sums.argsort(dim=1, descending=True, stable=True) for layer, sums in self.sums.items()}
        return {"tokens": tokens, "layers": {str(layer): ranked[layer].tolist() for layer in sorted(ranked)}}
