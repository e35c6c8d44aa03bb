"""The decode step of one sequence in one call of C++: its token is stored, and its query reads what is held."""

from __future__ import annotations

import torch
from torch import Tensor

from kvote.kernels.checks import check
from kvote.kernels.contract import Choice, Row
from kvote.kernels.cpu.attention import MAX_QUERIES_PER_KV
from kvote.kernels.cpu.library import TYPES, _cpu
from kvote.kernels.lanes import Lanes

_UNROTATED, _EVERYTHING = (0,) * 6, (0,) * 9


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: int,
    length: int,
    pools: tuple[Tensor, Tensor, Tensor],
    lanes: Lanes,
    sketch: Tensor | None,
    bits: int,
    *,
    back: Row | None,
    angles: tuple[Tensor, Tensor] | None,
    interleaved: bool,
    choice: Choice | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, bool]:
    """Stores the next token of one sequence as ``append`` does and attends to what is held as ``decode`` does: the
    answer [1, 1, heads, d] in float32, and whether ``choice.kept`` was read.

    ``query`` [1, heads, 1, d], ``key`` and ``value`` [1, h, 1, d]; ``length`` tokens are held before. With ``back``,
    which takes the model's rotation out of them, keys are held at position 0, and tokens are read at positions
    0 .. n - 1 by ``angles`` [>= n, r]. ``choice``: what is read; None: all.
    """
    sequences, heads, rows, dim = query.shape
    _, h, _, _ = shape = key.shape
    (_, query_stride, _, query_step), (_, key_stride, _, key_step) = query.stride(), key.stride()
    _, value_stride, _, value_step = value.stride()
    keys, values, positions = pools
    check(sequences == rows == 1 and heads == h * (heads // h), "there must be one query position")
    check(shape == value.shape == (1, h, 1, dim) and heads // h <= MAX_QUERIES_PER_KV, "heads must be of one size")
    check(query_step == key_step == value_step == 1, "channels must be contiguous")
    check(query.dtype == key.dtype == value.dtype == keys.dtype, "dtypes must be those of the pools")
    check(keys.shape == values.shape and lanes.count == h, "pools must be alike, and of one lane for each key head")
    rotation, last, threads = _UNROTATED, length, torch.get_num_threads()
    if choice is not None:
        check(0 < choice.top_k <= choice.edge - choice.sinks and choice.edge <= length, "there must be candidates")
        last = max(choice.sinks + choice.top_k + length - choice.edge, choice.asked_at)
    if back is not None and angles is not None:
        check(len(angles[0]) > last and angles[0].shape[1] == back[0].shape[1], "angles must reach as far as the list")
        (back_cos, back_sin, row), (cos, sin), pairs = back, angles, angles[0].shape[1]
        check(row < len(back_cos) == len(back_sin) and 2 * pairs <= dim, "there must be a row of angles to undo")
        check(all(a.is_contiguous() for a in (back_cos, back_sin, cos, sin)), "angles must be contiguous rows")
        check(back_cos.dtype == back_sin.dtype == cos.dtype == sin.dtype == torch.float32, "angles must be float32")
        offset = 4 * pairs * row
        rotation = (
            back_cos.data_ptr() + offset,
            back_sin.data_ptr() + offset,
            cos.data_ptr(),
            sin.data_ptr(),
            pairs,
            interleaved,
        )
    out, lse = torch.empty(1, 1, heads, dim), torch.empty(heads)
    reused: bool = _cpu.step(
        (query.data_ptr(), query_stride, key.data_ptr(), key_stride, value.data_ptr(), value_stride),
        TYPES[keys.dtype],
        position,
        *lanes.address,
        heads // h,
        dim,
        length,
        (
            keys.data_ptr(),
            values.data_ptr(),
            positions.data_ptr(),
            0 if sketch is None else sketch.data_ptr(),
            bits,
        ),
        rotation,
        _EVERYTHING if choice is None else _addresses(choice),
        0.0 if choice is None else choice.theta,
        scale,
        softcap or 0.0,
        out.data_ptr(),
        lse.data_ptr(),
        threads,
    )
    return out, reused


def _addresses(choice: Choice) -> tuple[int, ...]:
    past, kept = (0 if t is None else t.data_ptr() for t in (choice.past, choice.kept))
    numbers = choice.top_k, choice.sinks, choice.edge, choice.nominate, choice.asked_at
    return *numbers, past, kept, choice.asked.data_ptr(), choice.winners.data_ptr()
