"""Checks of loaded state, so that nothing reads out of bounds: counts, places and shapes that come from a file."""

from typing import Any

import torch
from torch import Tensor

from kvote.saving.pages import check_lanes

_MOST = 2**31 - 1


def layer(made: Any) -> None:
    """Checks a whole layer: its segment, and all that names tokens of it."""
    counts = ("seen", "settled", "encoded", "shown", "expected", "prompt_left", "changes")
    if any(not 0 <= getattr(made, name) <= _MOST for name in counts):
        raise ValueError("a layer counts tokens that there cannot be")
    rows, columns = made.sequences, made.columns
    if columns is not None and (columns.dtype != torch.bool or columns.shape != (rows, made.seen)):
        raise ValueError("the columns of a layer are not those that it has seen")
    if made.segment is None:
        return
    lengths = [made.segment.length(row) for row in range(rows)]
    if max(lengths, default=0) > made.seen:
        raise ValueError("a layer holds more tokens than it has seen")
    if made.memory is not None:
        _memory(made.memory, lengths)


def _memory(memory: Any, lengths: list[int]) -> None:
    """Tokens that a reader remembers, in lists that it will read again or by its own ``fits``."""
    if hasattr(memory, "fits") and not memory.fits(lengths):
        raise ValueError("a reader remembers tokens that are not held")
    lists = getattr(memory, "index", None)
    if isinstance(lists, dict):
        if any(not isinstance(row, int) or not 0 <= row < len(lengths) for row in lists):
            raise ValueError("a reader remembers a sequence that is not there")
        for row, index in lists.items():
            _slots(index, lengths[row])
    elif isinstance(lists, Tensor):
        edge, query = memory.edge, memory.query
        if edge is None or query is None or not len(edge) == len(lists) == len(query) == len(lengths):
            raise ValueError("a reader remembers other sequences than there are")
        if edge.dtype != torch.int64 or edge.dim() != 1 or query.dim() != 2 or lists.dim() != 2:
            raise ValueError("what a reader remembers has another form")
        for row, length in enumerate(lengths):
            if int(edge[row]) >= 0:
                _slots(lists[row], min(length, int(edge[row])))


def _slots(index: Tensor, length: int) -> None:
    if index.dtype != torch.int64 or (index.numel() and not 0 <= int(index.min()) <= int(index.max()) < length):
        raise ValueError("a reader remembers tokens that are not held")


def uncompressed(made: Any) -> None:
    """Key heads of a sequence hold equally many tokens."""
    check_lanes(made.pool, made.heads)


def uneven(made: Any) -> None:
    """Key heads of a sequence hold equally many tokens, unless they are said to differ."""
    if not made.by_head:
        check_lanes(made.pool, made.heads)
    elif len(made.pool.lanes) % made.heads or made.alike:
        raise ValueError("key heads that differ are not all there")


def packed(made: Any) -> None:
    """The same of packed tokens."""
    check_lanes(made.pool, made.heads)


def quantised(made: Any) -> None:
    """Packed and uncompressed tokens of each sequence meet."""
    packed = made.packed
    if len(packed.before) != made.sequences:
        raise ValueError("packed tokens are those of other sequences than there are")
    if made.keys.pool.lanes and len(made.keys.pool.lanes) != len(made.values.pool.lanes):
        raise ValueError("keys and values are packed of unequally many sequences")
    for row, before in enumerate(packed.before):
        if before.dtype != torch.int32 or before.dim() != 2 or len(before) not in (1, made.heads):
            raise ValueError("packed tokens stand at other positions than there are")
        if not before.shape[1] <= made.values.length(row) <= made.keys.length(row) <= made.length(row):
            raise ValueError("packed and uncompressed tokens of a sequence do not meet")


def offloaded(made: Any) -> None:
    """What lies on the disk and what is in memory are of the same sequences."""
    if len(made.disk.blocks) != made.uncompressed.sequences:
        raise ValueError("tokens on a disk are those of other sequences than there are")


def apart(made: Any) -> None:
    """The same, and sinks are tokens that are held."""
    quantised(made)
    exact, largest = made.packed.exact, made.largest
    lists = isinstance(exact, list) and isinstance(largest, list)
    if not lists or not len(exact) == len(largest) == made.sequences:
        raise ValueError("sinks are those of other sequences than there are")
    none = made.packed.none
    for row, each in enumerate(exact):
        fits = type(each) is type(none) and each.key.shape[1:] == none.key.shape[1:]
        if not fits or each.value.shape[1:] != none.value.shape[1:] or each.key.dtype != none.key.dtype:
            raise ValueError("sinks have another form")
        _slots(each.slots, made.values.length(row))
        _slots(each.heads, made.heads)
    if any(type(each).__name__ != "Largest" for each in largest):
        raise ValueError("what is known of sinks has another form")


def exact(made: Any) -> None:
    """Heads, slots, keys and values are of equally many tokens."""
    parts = (made.heads, made.slots, made.key, made.value)
    if len({len(part) for part in parts}) != 1 or any(part.dim() != 1 + (i > 1) for i, part in enumerate(parts)):
        raise ValueError("sinks have another form")


def largest(made: Any) -> None:
    """Sizes and positions are of equally many entries."""
    if made.sizes.dim() != 1 or made.sizes.shape != made.positions.shape or made.positions.dtype != torch.int64:
        raise ValueError("what is known of sinks has another form")


def prompt(made: Any) -> None:
    """Each encoded prompt has the heads and channels of what comes behind it."""
    if not len(made.bodies) == len(made.waiting) == made.uncompressed.sequences:
        raise ValueError("encoded prompts are those of other sequences than there are")
    for body in made.bodies:
        if body is not None and body.read(range(0, 1))[0].shape != (
            made.heads,
            min(1, _tokens(body)),
            _dim(made),
        ):
            raise ValueError("an encoded prompt has another form")


def _tokens(body: Any) -> int:
    return int(body.positions.shape[1])


def _dim(made: Any) -> int:
    return int(made.uncompressed.pool.keys.shape[-1])


def thin(made: Any) -> None:
    """Pages hold all tokens, and channels are some that there are."""
    h, pages, kept, page = made.keys.shape
    n = made.values.shape[1]
    fits = made.channels.shape == (h, kept) and made.positions.shape == (h, n) and len(made.values) == h
    if not fits or page != 64 or pages != -(-n // page) or made.channels.dtype != torch.int16:
        raise ValueError("thin keys have another form")
    if made.channels.numel() and not 0 <= int(made.channels.min()) <= int(made.channels.max()) < made.dim:
        raise ValueError("thin keys name channels that there are not")


def basis(made: Any) -> None:
    """Keys, values and positions are of equally many tokens."""
    if made.key.dim() != 2 or made.value.dim() != 2 or not len(made.key) == len(made.value) == len(made.positions):
        raise ValueError("a basis has another form")


def low_rank(made: Any) -> None:
    """A layer's block fits the basis of its group."""
    key, value, of = made.key, made.value, made.basis
    if key.dim() != 3 or value.dim() != 3 or key.shape[0] != of.key.shape[1] or value.shape[0] != of.value.shape[1]:
        raise ValueError("a layer's block does not fit its basis")


def side(made: Any) -> None:
    """Sizes and retained tokens of both layers fit the directions that they share."""
    shape, places = made.direction.shape, made.places
    both = [*made.sizes, *made.retained]
    if len(shape) != 3 or len(made.sizes) != 2 or len(made.retained) != 2 or places.dim() != 1:
        raise ValueError("what two layers share has another form")
    if any(not isinstance(part, Tensor) for part in both) or any(part.shape != shape[:2] for part in made.sizes):
        raise ValueError("what two layers share has another form")
    if any(part.shape != (len(places), shape[2]) for part in made.retained) or places.dtype != torch.int64:
        raise ValueError("retained tokens have another form")
    if len(places) and not (
        bool((places.diff() > 0).all()) and 0 <= int(places[0]) <= int(places[-1]) < shape[0] * shape[1]
    ):
        raise ValueError("retained tokens stand where there are none")


def pair(made: Any) -> None:
    """Keys, values and positions are of equally many tokens."""
    if made.positions.dim() != 1 or made.key.direction.shape[:2] != made.value.direction.shape[:2]:
        raise ValueError("what two layers share has another form")
    if made.key.direction.shape[1] != len(made.positions):
        raise ValueError("what two layers share has another form")


def merged(made: Any) -> None:
    """It is one of two layers."""
    if made.layer not in (0, 1):
        raise ValueError("a pair has two layers")


def two_precisions(made: Any) -> None:
    """Demoted keys and values are of equally many tokens."""
    rows = check_lanes(made.pool, made.heads)
    if not len(made.balances) == len(made.waiting) == len(rows):
        raise ValueError("what is known of channels is of other sequences than there are")
    counts = [check_lanes(part.pool, made.heads) for part in made._low]
    if any(each != counts[0] or len(each) != len(rows) for each in counts):
        raise ValueError("keys and values are packed of unequally many tokens")


def salient(made: Any) -> None:
    """Codes, marks and what goes with them are of the same tokens, heads and channels."""
    h, n, d = len(made.marks), made.positions.shape[1], made.high.channels.shape[2]
    fits = made.marks.dtype == torch.uint8 and made.marks.shape == (h, -(-n // 8))
    fits &= len(made.factor) == h and len(made.positions) in (1, h) and made.positions.dtype == torch.int32
    for part, bits, which in (
        (made.high, made.bits.high, made.salient()),
        (made.low, made.bits.low, ~made.salient()),
    ):
        if bits not in (2, 4, 8):
            raise ValueError("salient tokens have another form")
        counts = which.sum(1)
        for codes, width in ((part.keys, d), (part.values, made.factor.shape[1])):
            fits &= codes.dtype == torch.uint8 and codes.shape == (int(counts.sum()), -(-width * bits // 8))
        fits &= part.channels.shape == (2, h, d) and part.rows.dim() == 2
        fits &= len(part.rows) == 2 and part.rows.shape[1] >= int(counts.max())
    if not fits:
        raise ValueError("salient tokens have another form")


def probed(made: Any) -> None:
    """Each encoded text has the heads and channels of what comes behind it, and probes are tokens behind it."""
    rows = made.uncompressed.sequences
    if not len(made.prompts.bodies) == len(made.probes) == rows:
        raise ValueError("encoded tokens are those of other sequences than there are")
    for row, (body, probes) in enumerate(zip(made.prompts.bodies, made.probes, strict=True)):
        if body is not None and body.read(range(0, 1))[0].shape != (made.heads, min(1, _tokens(body)), _dim(made)):
            raise ValueError("an encoded text has another form")
        if probes is None:
            continue
        query, slots = probes.query, probes.slots
        if probes.places.shape != slots.shape or probes.places.dtype != torch.int64:
            raise ValueError("probes have another form")
        if query.dim() != 3 or query.shape[1:] != (len(slots), _dim(made)) or len(query) % made.heads:
            raise ValueError("probes have another form")
        if slots.dtype != torch.int64 or (
            len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < made.length(row)
        ):
            raise ValueError("probes are tokens that are not held")
