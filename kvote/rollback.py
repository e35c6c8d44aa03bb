"""A layer goes back: to where it was before a pass, and to fewer tokens."""

from typing import cast

from kvote.errors import CropError
from kvote.inference import outside_inference
from kvote.layer_state import LayerState
from kvote.passes import Checkpoint
from kvote.read.reader import AddsUp
from kvote.settling import compress_all, drop, finish


def checkpoint_of(layer: LayerState) -> Checkpoint:
    """Makes the checkpoint that ``restore`` needs. Cheap."""
    return Checkpoint(
        None if layer.segment is None else layer.segment.checkpoint(),
        None if layer.memory is None else layer.memory.checkpoint(),
        list(layer.record.waiting),
        dict(vars(layer.activity)),
        layer.columns,
        (layer.seen, layer.expected, layer.prompt_left, layer.prompted, layer.right_padded),
        layer.changes,
    )


def restore(layer: LayerState, checkpoint: Checkpoint) -> bool:
    """Forgets what a pass has added since ``checkpoint``; False if it has dropped or encoded something."""
    if layer.changes != checkpoint.changes:
        return False
    if checkpoint.held is None:
        layer.segment, layer.memory, layer.record.memory = None, None, None
    elif layer.segment is not None:
        if not layer.segment.restore(checkpoint.held):
            return False
        if layer.memory is not None:
            layer.memory.restore(checkpoint.memory)
    layer.record.waiting = checkpoint.waiting
    vars(layer.activity).update(checkpoint.activity)
    layer.columns = checkpoint.columns
    layer.seen, layer.expected, layer.prompt_left, layer.prompted, layer.right_padded = checkpoint.numbers
    layer.settled = min(layer.settled, layer.seen)
    return True


def check_crop(layer: LayerState, columns: int) -> None:
    """As ``Layer.check_crop``."""
    columns = min(columns, layer.seen)
    if columns and layer.seen - columns < layer.settled:
        what = "dropped tokens" if layer.activity.dropped else "added up attention"
        raise CropError(
            f"{layer.method.spec} has {what} that a rollback of {columns} would need back; call "
            "cache.activate_past_recording() before the tokens that may be rolled back, or use a method that "
            "keeps everything."
        )


@outside_inference
def crop(layer: LayerState, columns: int, prompt_left: int | None) -> None:
    """As ``Layer.crop``."""
    if layer.segment is None:
        return
    columns = min(columns, layer.seen)
    check_crop(layer, columns)
    if columns:
        lengths = _lengths(layer, columns)
        keep = layer.method.keep
        # Votes for a prompt that is no more are forgotten; what was heard of one that was read again outlives a crop.
        if not (layer.keeps.adds_up or keep.needs.repeat_chunk) and prompt_left is None:
            layer.record.memory = keep.new_memory()
        # Before the tokens go: what remains of a pass may be listed together with them.
        layer.record.settle(lengths)
        _shorten(layer, lengths, columns)
        layer.prompt_left = prompt_left or 0
    layer.segment.trim()
    drop(layer)
    compress_all(layer)


@outside_inference
def forget_shown(layer: LayerState, columns: int) -> None:
    """As ``Layer.forget_shown``."""
    if layer.segment is None:
        return
    layer.record.settle(_lengths(layer, 0))
    _shorten(layer, _lengths(layer, columns), columns)
    layer.settled = layer.shown = layer.seen
    layer.segment.trim()
    layer.prompt_left, layer.record_past = 0, False
    finish(layer)
    layer.count()


def _lengths(layer: LayerState, columns: int) -> list[int]:
    """Tokens of each sequence without those of the last ``columns``."""
    assert layer.segment is not None
    held = [layer.segment.length(row) for row in range(layer.sequences)]
    if layer.columns is None:
        return [length - columns for length in held]
    gone = layer.columns[:, layer.seen - columns : layer.seen].sum(dim=1).tolist()
    return [length - each for length, each in zip(held, gone, strict=True)]


def _shorten(layer: LayerState, lengths: list[int], columns: int) -> None:
    """Forgets the last ``columns``, which leaves sequences with ``lengths``."""
    assert layer.segment is not None
    layer.record.truncate(lengths)
    for row, length in enumerate(lengths):
        if length < layer.segment.length(row):
            layer.segment.truncate(row, length)
    layer.seen -= columns
    if layer.columns is not None:
        layer.columns = layer.columns[:, : layer.seen].clone()
    if layer.memory is not None:
        if layer.method.read.offers.adds_up:
            cast(AddsUp, layer.memory).take_back(layer.segment, lengths)
            layer.settled = layer.seen
        else:
            layer.memory.forget()
