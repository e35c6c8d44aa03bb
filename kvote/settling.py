"""What becomes of a layer's tokens once a pass is answered: the keeper lets some go, the store encodes old ones."""

from kvote.byte_budget import budget_of
from kvote.inference import outside_inference
from kvote.keep.keeper import Held
from kvote.layer_state import LayerState
from kvote.store.uneven import UnevenSegment


def finish(layer: LayerState) -> None:
    """Drops and encodes what is due."""
    # What interrupts this may have been interrupted in the middle of it.
    layer.changes += 1
    dropped, encoded = drop(layer), compress_all(layer)
    if layer.method.read.offers.adds_up:
        layer.settled = layer.seen
    if not dropped and not encoded:
        layer.changes -= 1


@outside_inference
def drop(layer: LayerState) -> bool:
    """Shows the keeper what it has not seen yet, and lets go of the tokens that it does not keep, here and in the
    layers before whose share of a budget that has changed. Says whether it saw or dropped anything."""
    keeps = layer.keeps
    if layer.segment is None or not keeps.drops:
        return False
    shown = layer.record.settle([layer.segment.length(row) for row in range(layer.sequences)])
    if shown:
        layer.shown = layer.seen
    if shown and keeps.adds_up:
        layer.settled = layer.seen
    if keeps.waits and layer.prompt_left:
        return shown
    prompted, layer.prompted = layer.prompted, False
    # Generated tokens change nothing in other layers.
    first = 0 if keeps.cascades and prompted else layer.number
    asked = layer.stack.layers[first : layer.number + 1]
    dropped = [drop_own(each, layer.number + 1, generated=not prompted) for each in asked]
    return shown or any(dropped)


def drop_own(layer: LayerState, observed: int, *, generated: bool) -> bool:
    """Lets go of the tokens of this layer that the keeper does not keep, by what it has been shown of the first
    ``observed`` layers. ``generated``: all that came since it was last asked was generated. Says whether any went, or
    the keeper noted something."""
    segment, memory = layer.segment, layer.record.memory
    if segment is None:
        return False
    before = layer.activity.dropped
    memories = [each.record.memory for each in layer.stack.layers] if layer.keeps.cascades else ()
    rope = layer.rope if layer.step_rope is None else None
    uneven = layer.method.keep.needs.uneven_heads
    for row in range(layer.sequences):
        length, budget = segment.length(row), budget_of(layer, row)
        held = Held(
            row=row,
            length=length,
            budget=length if budget is None else budget,
            segment=segment,
            memories=memories,
            layer=layer.number,
            observed=observed,
            rope=rope,
            generated=generated,
            layers=len(layer.stack),
            seen=layer.tokens_seen(row),
            rotation=layer.rope,
            lanes=segment.lengths(row) if uneven and isinstance(segment, UnevenSegment) else (),
        )
        kept = layer.method.keep.survivors(held, memory)
        if kept is not None:
            had = layer.held_of(row)
            segment.keep(row, kept.slots, kept.content)
            if memory is not None:
                memory.keep(row, kept.slots)
            layer.activity.dropped += had - layer.held_of(row) or int(uneven)
            layer.settled = layer.seen
    if layer.memory is not None and layer.activity.dropped > before:
        # What a reader remembers are slots, and other tokens stand there now.
        layer.memory.forget()
    return memory is not None or layer.activity.dropped > before


def compress_all(layer: LayerState) -> bool:
    """Seals, unless later layers may still take tokens from this one: then all are compressed after the last. Says
    whether anything was encoded."""
    if not layer.keeps.cascades:
        return compress(layer)
    if layer.number == len(layer.stack.layers) - 1:
        return sum(compress(each) for each in layer.stack.layers) > 0
    return False


@outside_inference
def compress(layer: LayerState) -> bool:
    """Lets the store encode what is old enough. Says whether it did."""
    if layer.segment is None:
        return False
    encoded = layer.segment.compress(layer.prompt_left)
    if layer.shares_layers:
        segments = [each.segment for each in layer.stack.layers]
        encoded |= layer.method.store.after_layer(segments, layer.number, layer.prompt_left)
    if encoded:
        layer.encoded = layer.seen
    return encoded
