"""Attention of single queries, and the attention that tokens received, read from the pages."""

import torch
from torch import Tensor

from kvote.kernels import checks
from kvote.kernels.contract import Angles
from kvote.kernels.cpu.library import MAX_DIM, TYPES, _cpu, why_not
from kvote.kernels.lanes import Lanes

MAX_QUERIES_PER_KV = 16


def decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lanes: Lanes,
    tokens: Tensor | range,
    *,
    angles: Angles | None,
    interleaved: bool,
    scale: float,
    softcap: float | None,
    ends: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query position per sequence: out [b, heads, d] and lse [b, heads], float32.

    ``query`` [b, heads, d]. ``tokens``: a range that all read, or int64 [b, m], ascending in each; with ``angles``
    [m, r] keys are rotated as they are read. ``ends``: of a range, each lane's tokens before ``ends[lane]`` only. The
    same bits for any number of threads.
    """
    sequences, heads, dim = query.shape
    queries_per_kv = checks.queries_per_kv_of(sequences * heads, lanes, MAX_QUERIES_PER_KV)
    checks.pair_of_pools(keys, values, dim)
    start, count = checks.tokens_of(tokens, sequences)
    query = query.float().contiguous()
    out, lse = torch.empty(sequences, heads, dim), torch.empty(sequences, heads)
    cos, sin, pairs = query, query, 0
    if angles is not None:
        checks.angles_fit(angles, count, dim)
        cos, sin = (a.float().contiguous() for a in angles)
        pairs = cos.shape[-1]
    pools = (
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        TYPES[keys.dtype],
        *lanes.address,
        queries_per_kv,
        dim,
    )
    rotated = (cos.data_ptr(), sin.data_ptr(), pairs, interleaved)
    rest = (scale, softcap or 0.0, out.data_ptr(), lse.data_ptr(), torch.get_num_threads())
    if ends is not None:
        checks.ends_of(ends, tokens, lanes)
        _cpu.decode_ragged(*pools, start, count, ends, *rotated, *rest)
        return out, lse
    listed = tokens.data_ptr() if isinstance(tokens, Tensor) else 0
    _cpu.decode(*pools, listed, lanes.count // sequences, start, count, *rotated, *rest)
    return out, lse


def attention_mass(
    query: Tensor,
    lse: Tensor,
    keys: Tensor,
    lanes: Lanes,
    start: int,
    limits: list[int],
    *,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention [b, h, n] that tokens ``start`` to ``max(limits)`` received.

    ``query`` [b, heads, t, d] and its ``lse`` [b, heads, t]; row i of t sees tokens before ``limits[i]``.
    """
    sequences, heads, t, dim = query.shape
    stop = checks.limits_of(limits, t, start)
    checks.pool_of_keys(keys, dim)
    h = lanes.count // sequences
    rows = heads // h * t
    query, lse = query.float().reshape(-1, rows, dim).contiguous(), lse.float().contiguous()
    out = torch.empty(sequences, h, stop - start)
    _cpu.attention_mass(
        query.data_ptr(),
        lse.data_ptr(),
        keys.data_ptr(),
        TYPES[keys.dtype],
        *lanes.address,
        rows,
        dim,
        start,
        stop,
        limits * (heads // h),
        scale,
        softcap or 0.0,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def why_not_thin(values: Tensor, queries_per_kv: int, kept: int) -> str | None:
    """Why ``thin_decode`` cannot answer ``queries_per_kv`` query heads per key head of ``kept`` channels, or None."""
    if queries_per_kv > MAX_QUERIES_PER_KV:
        return f"more than {MAX_QUERIES_PER_KV} query heads share a key head"
    return f"keys have more than {MAX_DIM} channels" if kept > MAX_DIM else why_not(values)


def thin_decode(
    query: Tensor, keys: Tensor, values: Tensor, stop: int, *, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of one query position over the first ``stop`` tokens of one sequence whose keys lie channel by channel:
    out [h, g, dv] and lse [h, g], float32.

    ``query`` [h, g, kept], ``keys`` [h, pages, kept, PAGE], ``values`` [h, n, dv]. The same bits for any number of
    threads.
    """
    h, queries_per_kv, kept = query.shape
    pages, tokens, dim = keys.shape[1], values.shape[1], values.shape[2]
    checks.thin(query, keys, values, stop)
    reason = why_not_thin(values, queries_per_kv, kept)
    checks.check(reason is None, str(reason))
    stride = -(-kept // 32) * 32
    rows = torch.nn.functional.pad(query.float(), (0, stride - kept)).contiguous()
    out, lse = torch.empty(h, queries_per_kv, dim), torch.empty(h, queries_per_kv)
    _cpu.thin_decode(
        rows.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        TYPES[keys.dtype],
        h,
        queries_per_kv,
        stride,
        kept,
        dim,
        pages,
        tokens,
        stop,
        scale,
        softcap or 0.0,
        out.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return out, lse
