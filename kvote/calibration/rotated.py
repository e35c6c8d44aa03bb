"""The order of key channels once key heads have been rotated: channels with alike offsets become neighbours (RotateKV).

``data``: {"tokens": how many were measured, "heads": key heads rotated together at most, "layers": {"layer": [rotated
channels of all key heads, the one with the smallest sum first]}}.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote.calibration.file import Calibration, command, is_layer, shown
from kvote.errors import InputError, MethodError
from kvote.needs import Keys, Needs
from kvote.read.reader import ReaderDefaults, Reading, everything
from kvote.store.transform import Rotation
from kvote.tokens import Span

KIND = "rotated"
# Key heads that are rotated together, as published.
HEADS = 4


def orders_of(calibration: Calibration, heads: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """By layer, the order of channels as a ``Rotation`` of ``heads`` key heads has it.

    Raises InputError unless every one is an order of all channels, MethodError if other heads were rotated together.
    """
    model, layers = calibration.model, calibration.data.get("layers")
    if calibration.kind != KIND or not isinstance(layers, dict) or not layers:
        raise InputError(f"{calibration.name} holds no layers with an order of rotated channels.")
    if calibration.data.get("heads") != heads:
        raise MethodError(
            f"{calibration.name} was measured with {shown(calibration.data.get('heads'))} key heads rotated together, "
            f"not with {heads}; make another one with {command(KIND)}, or change heads."
        )
    channels, found = model.kv_heads * model.head_dim, []
    for name, order in layers.items():
        whole = isinstance(order, list) and len(order) == channels and all(type(i) is int for i in order)
        if not is_layer(name, model.layers) or not whole or sorted(order) != list(range(channels)):
            raise InputError(f"{calibration.name}: layer {shown(name)} is not an order of {channels} channels.")
        found.append((int(name), tuple(order)))
    return tuple(found)


@dataclass(frozen=True)
class RotatedSums(ReaderDefaults):
    """Reads everything, and adds up keys without positions, ``heads`` key heads rotated together.

    ``sums``: by layer, float64 [kv_heads, head_dim].
    """

    heads: int = HEADS
    sums: dict[int, Tensor] = field(default_factory=dict)
    needs = Needs(keys=Keys.UNROTATED)

    def read(self, reading: Reading) -> Iterator[Span]:
        key = reading.segment.decode(reading.rows, reading.first, reading.first + reading.count)[0]
        turned = Rotation(self.heads).of(key.shape[1], key.shape[3], key.device).apply(key.float())
        own = turned.double().sum(dim=(0, 2)).cpu()
        self.sums[reading.layer] = self.sums.get(reading.layer, torch.zeros_like(own)) + own
        yield everything(reading)

    def data(self, tokens: int) -> dict[str, object]:
        """The facts of a calibration file; equal channels in their natural order."""
        ranked = {layer: sums.flatten().argsort(stable=True) for layer, sums in self.sums.items()}
        layers = {str(layer): ranked[layer].tolist() for layer in sorted(ranked)}
        return {"tokens": tokens, "heads": self.heads, "layers": layers}
