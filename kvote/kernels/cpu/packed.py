"""The C++ kernels for packed keys and values, as functions of tensors. Contracts as in ``kvote.kernels.packing``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvote.kernels import cpu
from kvote.kernels.cpu import Lanes
from kvote.kernels.packing import PACKED, Packing

# Absent where it could not be compiled; nobody calls these functions then.
_cpu: Any = getattr(cpu, "_cpu", None)

# Raw pools of keys and of values, where the lanes lie in them, and which tokens are read.
Recent = tuple[Tensor, Tensor, Lanes, range]
_NOTHING = (0,) * 8


def _check(holds: bool, what: str) -> None:
    """The kernels trust their arguments; what would make them read elsewhere is refused here."""
    if not holds:
        raise ValueError(f"kvote.kernels.cpu.packed: {what}.")


def _pool(pages: Tensor, form: Packing, lanes: Lanes) -> tuple[int, ...]:
    _check(form.width == form.dim, "the head size must be a multiple of 16")
    _check(pages.is_contiguous() and pages.shape[-1] == form.page_bytes, "pages must be a contiguous pool of the form")
    return (
        pages.data_ptr(),
        cpu._TYPES[form.dtype],
        *lanes.address,
        form.bits,
        form.group,
        form.dim,
        int(form.by_token),
    )


def _raw(recent: Recent, form: Packing, lanes: int, sequences: int, groups: int) -> tuple[int, ...]:
    keys, values, table, tokens = recent
    _check(groups <= cpu.MAX_GROUPS, f"more than {cpu.MAX_GROUPS} query heads share a key head")
    _check(keys.shape == values.shape and keys.shape[-1] == form.dim, "recent tokens must have the head size")
    _check(keys.dtype == values.dtype == form.dtype, "recent tokens must be of the dtype of the form")
    _check(keys.is_contiguous() and values.is_contiguous(), "recent tokens must be in contiguous pools")
    _check(table.count == lanes, "recent tokens must be of as many lanes")
    return keys.data_ptr(), values.data_ptr(), *table.address, lanes // sequences, tokens.start, len(tokens)


def pack(x: Tensor, pages: Tensor, form: Packing, lanes: Lanes, first: list[int]) -> None:
    """Writes tokens ``x`` [lanes, m, d] behind the first ``first[lane]`` tokens of each lane; keys in whole groups,
    unless they are packed by token."""
    count = x.shape[1]
    _check(x.shape[0] == lanes.count == len(first), "there must be as many lanes as tokens are given for")
    _check(x.stride(-1) == 1 and x.dtype == form.dtype, "channels must be contiguous and of the dtype of the form")
    _check(x.shape[2] == form.dim, "tokens must have the head size of the form")
    alone = form.by_token or not form.are_keys
    _check(alone or not any(n % form.group for n in (count, *first)), "keys come in whole groups")
    threads = torch.get_num_threads()
    pool = _pool(pages, form, lanes)
    _cpu.pack(pool, form.are_keys, x.data_ptr(), x.stride(0), x.stride(1), count, first, threads)


def unpack(pages: Tensor, form: Packing, lanes: Lanes, tokens: Tensor | range, sequences: int, out: Tensor) -> None:
    """Decodes a range of tokens, or ``tokens`` int64 [sequences, m], of all lanes to ``out`` [lanes, >= m, d]."""
    if isinstance(tokens, Tensor):
        _check(tokens.dtype == torch.int64 and tokens.is_contiguous(), "tokens must be contiguous int64")
        _check(tokens.shape[0] == sequences, "there must be one list per sequence")
        index, start, count = tokens.data_ptr(), 0, tokens.shape[1]
    else:
        index, start, count = 0, tokens.start, len(tokens)
    _check(out.dtype == form.dtype and out.shape[0] == lanes.count, "out must be of the dtype of the form, by lanes")
    _check(out.shape[1] >= count and out.shape[2] == form.dim, "out must have room for the tokens")
    _check(out.stride(1) == form.dim and out.stride(2) == 1, "out must be contiguous but for its lanes")
    each, threads = lanes.count // sequences, torch.get_num_threads()
    _cpu.unpack(
        _pool(pages, form, lanes), form.are_keys, index, each, start, count, out.data_ptr(), out.stride(0), threads
    )


def attend(
    query: Tensor,
    keys: tuple[Tensor, Packing, Lanes],
    values: tuple[Tensor, Packing, Lanes],
    tokens: range,
    *,
    recent: Recent | None = None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query position per sequence over a range of packed tokens, and over ``recent`` ones: out
    [sequences, heads, d] and lse [sequences, heads], float32.

    ``query`` [sequences, heads, d], head = h_kv * g + i; lanes are (sequence, key head) in that order. Products of
    codes and of scales times a query (keys) or weights (values) are summed in float32. Where one instruction
    multiplies bfloat16 and the model is bfloat16, those products with scales are rounded to bfloat16; not for 8 bits.
    The same bits for any number of threads.
    """
    sequences, heads, dim = query.shape
    groups = sequences * heads // keys[2].count
    _check(groups * keys[2].count == sequences * heads, "every key head must have as many query heads")
    _check(keys[1].dim == values[1].dim == dim, "keys and values must have the query's head size")
    _check(keys[1].dtype == values[1].dtype and keys[1].bits == values[1].bits, "keys and values must be alike")
    _check(keys[1].are_keys and not values[1].are_keys, "keys must be keys and values values")
    query = query.float().contiguous()
    out, lse = torch.empty(sequences, heads, dim), torch.empty(sequences, heads)
    _cpu.packed_attend(
        query.data_ptr(),
        _pool(*keys),
        _pool(*values),
        _NOTHING if recent is None else _raw(recent, keys[1], keys[2].count, sequences, groups),
        groups,
        tokens.start,
        tokens.stop,
        scale,
        softcap or 0.0,
        out.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return out, lse


def scores(query: Tensor, keys: tuple[Tensor, Packing, Lanes], tokens: range) -> Tensor:
    """q.k [sequences, heads, r, n] of ``query`` [sequences, heads, r, d] with a range of packed keys; as ``attend``."""
    sequences, heads, r, dim = query.shape
    rows = sequences * heads // keys[2].count * r
    _check(rows * keys[2].count == sequences * heads * r, "every key head must have as many query heads")
    _check(keys[1].are_keys and keys[1].dim == dim, "keys must be keys of the query's head size")
    query = query.float().contiguous()
    out = torch.empty(sequences, heads, r, len(tokens))
    threads = torch.get_num_threads()
    pool = _pool(*keys)
    _cpu.packed_scores(query.data_ptr(), pool, rows, tokens.start, tokens.stop, out.data_ptr(), threads)
    return out


__all__ = ["PACKED", "attend", "pack", "scores", "unpack"]
