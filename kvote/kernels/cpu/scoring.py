"""Scores, soft votes and the tokens that win them; sketches of keys, which votes may be counted by."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvote.kernels import checks
from kvote.kernels.cpu.library import TYPES, _cpu
from kvote.kernels.lanes import Lanes

SKETCH_TOKENS = 32


def scores(query: Tensor, keys: Tensor, lanes: Lanes, start: int, stop: int) -> Tensor:
    """q.k [b, r, heads, stop - start] of ``query`` [b, heads, r, d] with a pool of keys [pages, PAGE, d]."""
    return _scores(_cpu.scores, query, keys, keys.shape[2], lanes, start, stop)


def label_scores(query: Tensor, labels: Tensor, lanes: Lanes, start: int, stop: int) -> Tensor:
    """The same from a pool of labels [pages, c, PAGE], channels before tokens, of any number of channels."""
    return _scores(_cpu.label_scores, query, labels, labels.shape[1], lanes, start, stop)


def _scores(
    kernel: Callable[..., None], query: Tensor, pool: Tensor, channels: int, lanes: Lanes, start: int, stop: int
) -> Tensor:
    rows = checks.scoring(query, pool, channels, lanes, start, stop)
    sequences, heads, r, dim = query.shape
    query = query.float().contiguous()
    out = torch.empty(sequences, heads, r, stop - start)
    if stop > start:
        kernel(
            query.data_ptr(),
            pool.data_ptr(),
            TYPES[pool.dtype],
            *lanes.address,
            rows,
            dim,
            start,
            stop,
            out.data_ptr(),
            torch.get_num_threads(),
        )
    return out.transpose(1, 2)


def votes(
    query: Tensor, keys: Tensor, lanes: Lanes, sketch: Tensor | None, bits: int, start: int, limits: list[int]
) -> Tensor:
    """Soft votes [b, r, n] for tokens ``start`` to ``max(limits)`` of ``query`` [b, heads, r, d], sequence by sequence;
    [r, n] of ``query`` [heads, r, d]. Weights from a sketch carry 11 bits."""
    *batch, heads, selections, dim = query.shape
    checks.pool_of_keys(keys, dim)
    stop = checks.limits_of(limits, selections, start)
    query, count = query.float().contiguous(), batch[0] if batch else 1
    out = torch.empty(*batch, selections, stop - start)
    each, where, written = lanes.count // count, query.data_ptr(), out.data_ptr()
    for i in range(count):
        _cpu.votes(
            where + i * (query.nbytes // count),
            keys.data_ptr(),
            TYPES[keys.dtype],
            *lanes.part(i * each, each),
            0 if sketch is None else sketch.data_ptr(),
            bits,
            heads // each,
            selections,
            dim,
            start,
            stop,
            limits,
            written + i * (out.nbytes // count),
            torch.get_num_threads(),
        )
    return out


def select(
    query: Tensor,
    keys: Tensor,
    lanes: Lanes,
    sketch: Tensor | None,
    bits: int,
    start: int,
    limits: list[int],
    k: int,
    nominate: int = 0,
    skip: Tensor | None = None,
) -> Tensor:
    """The ``k`` tokens [b, r, k] with the most ``votes``, ascending, ties to the lower one; arguments as there.

    With ``nominate``, votes from the sketch nominate that many tokens (fewer where there are no more), which are
    scored again with their keys; votes counted with those scores decide among them (``reference.rescored``). Everybody
    is answered, also who is to ``skip``.
    """
    *batch, heads, selections, dim = query.shape
    checks.pool_of_keys(keys, dim)
    stop, fewest = checks.limits_of(limits, selections, start), checks.winners_of(k, start, limits)
    query, count = query.float().contiguous(), batch[0] if batch else 1
    out = torch.empty(*batch, selections, k, dtype=torch.int64)
    each, where, written = lanes.count // count, query.data_ptr(), out.data_ptr()
    for i in range(count):
        _cpu.select(
            where + i * (query.nbytes // count),
            keys.data_ptr(),
            TYPES[keys.dtype],
            *lanes.part(i * each, each),
            0 if sketch is None else sketch.data_ptr(),
            bits,
            heads // each,
            selections,
            dim,
            start,
            stop,
            limits,
            k,
            min(max(nominate, k), fewest) if nominate else 0,
            written + i * (out.nbytes // count),
            torch.get_num_threads(),
        )
    return out


def top_k(votes: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest of ``votes`` [..., n] float32, ascending; ties go to the lower index."""
    votes = votes.float().contiguous()
    n = votes.shape[-1]
    checks.winners_of(k, 0, [n])
    out = torch.empty(*votes.shape[:-1], k, dtype=torch.int64)
    _cpu.top_k(votes.data_ptr(), votes.numel() // n, n, k, out.data_ptr(), torch.get_num_threads())
    return out


def sketch_bytes(dim: int, bits: int) -> int:
    """Bytes of the sketch of ``SKETCH_TOKENS`` tokens: codes of ``bits`` and one half-precision scale each."""
    return SKETCH_TOKENS * (dim * bits // 8 + 2)


def sketch(keys: Tensor, sketch: Tensor, bits: int, lanes: Lanes, start: int, stop: int) -> None:
    """Encodes tokens ``start`` to ``stop`` of lanes, all that they hold, of ``keys`` [pages, PAGE, d] into ``sketch``
    [pages, bytes], each less the centre of its lane (``reference.centre``)."""
    checks.sketching(keys, sketch, start, stop)
    _cpu.sketch(
        keys.data_ptr(),
        TYPES[keys.dtype],
        sketch.data_ptr(),
        bits,
        keys.shape[-1],
        *lanes.address,
        start,
        stop,
        torch.get_num_threads(),
    )
