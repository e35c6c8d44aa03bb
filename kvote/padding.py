"""Columns of a batch that were tokens of a row, where others were padding."""

import torch
from torch import Tensor

from kvote.errors import InputError
from kvote.layer_state import LayerState


def note_padding(layer: LayerState, valid: Tensor | None, b: int, t: int) -> None:
    """Which columns of the batch were tokens. Nothing is stored until a padded column appears."""
    if valid is None and layer.columns is None:
        return
    device = layer.segment.device if layer.segment else None
    if layer.columns is None:
        layer.columns = torch.ones(b, layer.seen, dtype=torch.bool, device=device)
    new = torch.ones(b, t, dtype=torch.bool, device=device) if valid is None else valid
    layer.columns = torch.cat([layer.columns, new], dim=1)


def drop_padded(layer: LayerState, past: Tensor | None) -> None:
    """Takes tokens out that the mask now calls padding (rows that ended before others, in a later turn)."""
    assert layer.segment is not None
    everything = torch.ones(layer.sequences, layer.seen, dtype=torch.bool, device=layer.segment.device)
    known = everything if layer.columns is None else layer.columns
    past = everything if past is None else past
    if torch.equal(known, past):
        return
    if layer.keeps.drops or layer.others_drop or bool((past & ~known).any()):
        raise InputError(
            f"The attention mask changed for tokens that {layer.method.spec} has already read; pass the same mask "
            "as before, or start anew with cache.reset()."
        )
    for row in (known & ~past).any(dim=1).nonzero()[:, 0].tolist():
        layer.changes += 1
        layer.segment.keep(row, past[row][known[row]].nonzero()[:, 0].cpu())
    layer.columns = past.clone()
    if layer.memory is not None:
        layer.memory.forget()
