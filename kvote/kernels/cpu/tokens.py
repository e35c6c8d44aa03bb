"""Rows of tokens written to pages, fetched from them, and rotated."""

import torch
from torch import Tensor

from kvote.kernels import checks
from kvote.kernels.contract import Angles
from kvote.kernels.cpu.library import TYPES, _cpu
from kvote.kernels.lanes import Lanes


def append(
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    pools: tuple[Tensor, Tensor, Tensor],
    lanes: Lanes,
    first: list[int],
    sketch: Tensor | None,
    bits: int,
) -> None:
    """Writes tokens ``key`` [b, h, t, d], ``value`` [b, h, t, dv] and ``positions`` [b, t] to the pools (keys, values,
    positions) behind the first ``first[lane]`` tokens of each lane, and sketches them."""
    checks.appending(key, value, positions, pools, lanes, first)
    sequences, heads, count, dim = key.shape
    keys, values, slot_positions = pools
    _cpu.append(
        key.data_ptr(),
        value.data_ptr(),
        TYPES[keys.dtype],
        key.stride()[:3],
        value.stride()[:3],
        positions.data_ptr(),
        positions.stride(0),
        sequences,
        heads,
        count,
        dim,
        value.shape[3],
        *lanes.address,
        first,
        keys.data_ptr(),
        values.data_ptr(),
        slot_positions.data_ptr(),
        0 if sketch is None else sketch.data_ptr(),
        bits,
        torch.get_num_threads(),
    )


def gather(
    keys: Tensor,
    values: Tensor,
    lanes: Lanes,
    index: Tensor,
    angles: Angles,
    interleaved: bool,
    out: tuple[Tensor, Tensor],
) -> None:
    """Writes the tokens ``index`` [b, q, m] to ``out`` [b, q, h, m, d] each, list by list, keys rotated by ``angles``
    [m, r] or [b, q, m, r]; or ``index`` [m] of one sequence to [h, m, d]."""
    checks.gathering(keys, values, index, out, angles)
    cos, sin = (a.float().contiguous() for a in angles)
    m, pairs, own = index.shape[-1], cos.shape[-1], cos.dim() > 2
    sequences, q = index.shape[:2] if index.dim() == 3 else (1, 1)
    each, size = lanes.count // sequences, out[0].nbytes // (sequences * q)
    for i in range(sequences * q):
        shift = 4 * i * m * pairs if own else 0
        _cpu.gather(
            keys.data_ptr(),
            values.data_ptr(),
            TYPES[keys.dtype],
            *lanes.part(i // q * each, each),
            keys.shape[-1],
            m,
            index.data_ptr() + 8 * i * m,
            cos.data_ptr() + shift,
            sin.data_ptr() + shift,
            pairs,
            interleaved,
            out[0].data_ptr() + i * size,
            out[1].data_ptr() + i * size,
            torch.get_num_threads(),
        )


def rotate(x: Tensor, angles: Angles, interleaved: bool) -> Tensor:
    """``reference.rotate`` of ``x`` [b, heads, n, d], channels contiguous, by float32 ``angles`` [n, r] or
    [b or 1, n, r]."""
    checks.rotation(x, angles)
    sequences, heads, count, dim = x.shape
    cos, sin = angles
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _cpu.turn(
        x.data_ptr(),
        TYPES[x.dtype],
        sequences,
        heads,
        count,
        dim,
        *x.stride()[:3],
        cos.data_ptr(),
        sin.data_ptr(),
        count if cos.dim() == 3 and cos.shape[0] > 1 else 0,
        cos.shape[-1],
        interleaved,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out
