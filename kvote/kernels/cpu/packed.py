"""The C++ kernels for packed keys and values. Layout and law in ``kvote.kernels.packing``."""

from __future__ import annotations

import torch
from torch import Tensor

from kvote.kernels import checks
from kvote.kernels.contract import Angles, PackedPool, Recent, Tail
from kvote.kernels.cpu.attention import MAX_QUERIES_PER_KV
from kvote.kernels.cpu.library import TYPES, _cpu
from kvote.kernels.lanes import Lanes
from kvote.kernels.packing import Packing

_NOTHING = (0,) * 8


def _pool(pages: Tensor, form: Packing, lanes: Lanes) -> tuple[int, ...]:
    checks.packed_pool(pages, form)
    form_of = form.bits, form.group_size, form.dim, int(form.by_token)
    return pages.data_ptr(), TYPES[form.dtype], *lanes.address, *form_of


def _recent(recent: Recent, form: Packing, lanes: int, sequences: int) -> tuple[int, ...]:
    keys, values, table, tokens = recent
    checks.recent_alike(keys, values, table, form, lanes)
    return keys.data_ptr(), values.data_ptr(), *table.address, lanes // sequences, tokens.start, len(tokens)


def pack(x: Tensor, pages: Tensor, form: Packing, lanes: Lanes, first: list[int]) -> None:
    """Writes tokens ``x`` [lanes, m, d] behind the first ``first[lane]`` tokens of each lane; keys in whole groups,
    unless they are packed by token."""
    checks.packing(x, form, lanes, first)
    threads, pool = torch.get_num_threads(), _pool(pages, form, lanes)
    _cpu.pack(pool, form.are_keys, x.data_ptr(), x.stride(0), x.stride(1), x.shape[1], first, threads)


def unpack(pages: Tensor, form: Packing, lanes: Lanes, tokens: Tensor | range, sequences: int, out: Tensor) -> None:
    """Decodes a range of tokens, or ``tokens`` int64 [b, m], of all lanes to ``out`` [lanes, >= m, d]."""
    start, count = checks.tokens_of(tokens, sequences)
    checks.unpacking(out, form, lanes, count)
    pool, index = _pool(pages, form, lanes), tokens.data_ptr() if isinstance(tokens, Tensor) else 0
    each, threads = lanes.count // sequences, torch.get_num_threads()
    _cpu.unpack(pool, form.are_keys, index, each, start, count, out.data_ptr(), out.stride(0), threads)


def attend(
    query: Tensor,
    keys: PackedPool,
    values: PackedPool,
    tokens: range,
    *,
    recent: Recent | None = None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query position per sequence over a range of packed tokens, and over ``recent`` ones: out
    [b, heads, d] and lse [b, heads], float32.

    ``query`` [b, heads, d]. Products of codes and of scales times a query (keys) or weights (values) are summed in
    float32. Where one instruction multiplies bfloat16 and the model is bfloat16, those products with scales are rounded
    to bfloat16; not for 8 bits. The same bits for any number of threads.
    """
    sequences, heads, dim = query.shape
    lanes = keys[2]
    # The kernel takes more query heads than that in turns, but not of uncompressed tokens.
    queries_per_kv = checks.queries_per_kv_of(
        sequences * heads, lanes, sequences * heads if recent is None else MAX_QUERIES_PER_KV
    )
    checks.packed_alike(query, keys, values, tokens)
    query = query.float().contiguous()
    out, lse = torch.empty(sequences, heads, dim), torch.empty(sequences, heads)
    _cpu.packed_attend(
        query.data_ptr(),
        _pool(*keys),
        _pool(*values),
        _NOTHING if recent is None else _recent(recent, keys[1], lanes.count, sequences),
        queries_per_kv,
        tokens.start,
        tokens.stop,
        scale,
        softcap or 0.0,
        out.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return out, lse


def scores(query: Tensor, keys: PackedPool, tokens: range) -> Tensor:
    """q.k [b, heads, r, n] of ``query`` [b, heads, r, d] with a range of packed keys; as ``attend``."""
    rows = checks.packed_scoring(query, keys, tokens)
    query = query.float().contiguous()
    out = torch.empty(*query.shape[:3], len(tokens))
    threads, pool = torch.get_num_threads(), _pool(*keys)
    _cpu.packed_scores(query.data_ptr(), pool, rows, tokens.start, tokens.stop, out.data_ptr(), threads)
    return out


def votes(query: Tensor, keys: PackedPool, tail: Tail, start: int, limits: list[int]) -> Tensor:
    """Soft votes [b, r, n] for tokens ``start`` to ``max(limits)`` of ``query`` [b, heads, r, d]; scores as ``attend``
    rounds them. Weights carry 11 bits where scores are rounded."""
    out = torch.empty(query.shape[0], query.shape[2], max(limits) - start)
    _vote(query, keys, tail, start, limits, 0, out.data_ptr(), 0)
    return out


def select(query: Tensor, keys: PackedPool, tail: Tail, start: int, limits: list[int], k: int) -> Tensor:
    """The ``k`` tokens [b, r, k] with the most ``votes``, ascending, ties to the lower one; arguments as there."""
    checks.winners_of(k, start, limits)
    out = torch.empty(query.shape[0], query.shape[2], k, dtype=torch.int64)
    _vote(query, keys, tail, start, limits, k, 0, out.data_ptr())
    return out


def _vote(
    query: Tensor, keys: PackedPool, tail: Tail, start: int, limits: list[int], k: int, votes: int, index: int
) -> None:
    queries_per_kv, stop = checks.packed_voting(query, keys, tail, start, limits)
    query = query.float().contiguous()
    pool, behind = _pool(*keys), (tail.keys.data_ptr(), tail.values.data_ptr(), *tail.lanes.address)
    shape = queries_per_kv, query.shape[2], start, stop
    where = query.data_ptr(), pool, behind, tail.packed, tail.first
    _cpu.packed_select(*where, *shape, limits, k, votes, index, torch.get_num_threads())


def decode(
    query: Tensor,
    keys: PackedPool,
    values: PackedPool,
    tail: Tail,
    tokens: Tensor,
    *,
    angles: Angles | None,
    interleaved: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query position per sequence, ``query`` [b, heads, d], over a list ``tokens`` int64 [b, m],
    ascending in each: out [b, heads, d] and lse [b, heads], float32.

    What is packed is decoded a block at a time, in cache, and with ``angles`` [m, r] rotated there. The same bits for
    any number of threads.
    """
    sequences, heads, dim = query.shape
    queries_per_kv = checks.queries_per_kv_of(sequences * heads, keys[2], MAX_QUERIES_PER_KV)
    count = checks.packed_listing(query, keys, values, tail, tokens)
    query = query.float().contiguous()
    out, lse = torch.empty(sequences, heads, dim), torch.empty(sequences, heads)
    cos, sin, pairs = query, query, 0
    if angles is not None:
        checks.angles_fit(angles, count, dim)
        cos, sin = (a.float().contiguous() for a in angles)
        pairs = cos.shape[-1]
    _cpu.packed_decode(
        query.data_ptr(),
        _pool(*keys),
        _pool(*values),
        (tail.keys.data_ptr(), tail.values.data_ptr(), *tail.lanes.address),
        tail.packed,
        tail.first,
        queries_per_kv,
        tokens.data_ptr(),
        count,
        cos.data_ptr(),
        sin.data_ptr(),
        pairs,
        interleaved,
        scale,
        softcap or 0.0,
        out.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return out, lse
