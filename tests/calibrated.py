"""Methods that need a calibration, calibrated on the spot."""

import functools
from collections.abc import Callable
from typing import Any

import tiny
from transformers import PreTrainedModel

from kvote import Method
from kvote.calibration import Calibration
from kvote.calibration.measure import measure_channels
from kvote.methods import doublesparsity


@functools.cache
def channels(net: PreTrainedModel) -> Calibration:
    """The key channels of a tiny model, measured on a few random tokens."""
    return measure_channels(net, [tiny.ids(2, 60, seed=77)])


def double_sparsity(**parameters: Any) -> Callable[[PreTrainedModel], Method]:
    """What builds it for a model."""
    return lambda net: doublesparsity(channels=channels(net), **parameters)
