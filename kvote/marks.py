"""A layer goes back: to where it was before a pass, and to fewer tokens."""

from kvote.layer_state import LayerState
from kvote.passes import Mark


def mark_of(layer: LayerState) -> Mark:
    """Makes the mark that ``restore`` needs. Cheap."""
    return Mark(
        None if layer.segment is None else layer.segment.mark(),
        None if layer.memory is None else layer.memory.mark(),
        list(layer.record.waiting),
        dict(vars(layer.activity)),
        layer.columns,
        (layer.seen, layer.expected, layer.ahead, layer.prompted, layer.holes),
        layer.changes,
    )


def restore(layer: LayerState, mark: Mark) -> bool:
    """Forgets what a pass has added since ``mark``; False if it has dropped or encoded something."""
    if layer.changes != mark.changes:
        return False
    if mark.held is None:
        layer.segment, layer.memory, layer.record.memory = None, None, None
    elif layer.segment is not None:
        if not layer.segment.restore(mark.held):
            return False
        if layer.memory is not None:
            layer.memory.restore(mark.memory)
    layer.record.waiting = mark.waiting
    vars(layer.activity).update(mark.activity)
    layer.columns = mark.columns
    layer.seen, layer.expected, layer.ahead, layer.prompted, layer.holes = mark.numbers
    layer.settled = min(layer.settled, layer.seen)
    return True


def take_back(layer: LayerState, lengths: list[int], ahead: int | None) -> None:
    """Cuts sequences to ``lengths``, and what the keeper has seen of them: votes for a prompt that is no more are
    forgotten, and passes that it has not been shown are cut."""
    assert layer.segment is not None
    # What was heard of a prompt that was read again outlives a crop.
    if not (layer.keeps.adds_up or layer.method.keep.needs.echo) and ahead is None:
        layer.record.memory = layer.method.keep.new_memory()
    # Before the tokens go: what remains of a pass may be listed together with them.
    layer.record.settle(lengths)
    layer.record.truncate(lengths)
    for row, length in enumerate(lengths):
        if length < layer.segment.length(row):
            layer.segment.truncate(row, length)
    layer.ahead = ahead or 0
