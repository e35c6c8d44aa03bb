"""The mask function: never an N x N mask for kvote's layers, the native one for all others."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from kvote.errors import InputError

_PADDING = "_kvote_padding"


@dataclass
class Padding:
    """Rides on the mask: which new and past columns are tokens, and how to make the mask that other caches need.

    ``valid`` [b, t] and ``past`` [b, seen] are None where all are tokens.
    """

    valid: Tensor | None
    past: Tensor | None
    native: Callable[[], Tensor | None]
    _made: list[Tensor | None] = field(default_factory=list)

    def native_mask(self) -> Tensor | None:
        if not self._made:
            self._made.append(self.native())
        return self._made[0]


def mask(native: str, **kwargs: Any) -> Tensor | None:
    """The mask function: for full attention a token of size 0 with the 2-D padding attached, never an N x N mask."""
    if isinstance(kwargs["q_offset"], Tensor):
        # A static cache counts in place, and the native mask is made after it has counted this pass.
        kwargs["q_offset"] = kwargs["q_offset"].clone()
    make = partial(ALL_MASK_ATTENTION_FUNCTIONS[native], **kwargs)
    if kwargs["mask_function"] is not causal_mask_function:
        return make()
    tokens, t = kwargs.get("attention_mask"), kwargs["q_length"]
    valid = past = None
    if tokens is not None:
        seen = kwargs["q_offset"]
        if tokens.shape[1] < seen + t:
            raise InputError(
                f"The attention mask covers {tokens.shape[1]} tokens, but the cache holds {seen} and {t} are new; pass "
                "a mask over all of them."
            )
        new = tokens[:, seen : seen + t]
        valid = None if bool(new.all()) else new
        past = None if bool(tokens[:, :seen].all()) else tokens[:, :seen]
    # Four axes, so that masks which generate() makes ahead pass through the model unchanged.
    carrier = torch.empty(0, 0, 0, 0, dtype=torch.bool)
    setattr(carrier, _PADDING, Padding(valid, past, make))
    return carrier


def padding_of(carrier: Tensor | None) -> Padding | None:
    """What rides on a mask made here; None for any other mask."""
    return getattr(carrier, _PADDING, None)
