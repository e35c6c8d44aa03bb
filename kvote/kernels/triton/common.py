"""Functions that the GPU kernels share: products, page tables on the device, and how work is split over a GPU.

**Pages.** A pool holds pages of 64 tokens. A lane's pages are a row of an int32 table on the device, made when pages
change hands and not per step. Offsets into a pool are 64 bits wide: a pool of a million tokens has more than 2^31
elements.

**Integers** that grow with every step are never specialised, or a kernel would be compiled anew in the middle of a
text (Triton compiles one for 1, one for multiples of 16 and one for the rest).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import ParamSpec, TypeVar

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvote.kernels import gpu
from kvote.kernels.checks import check
from kvote.kernels.lanes import PAGE as PAGE
from kvote.kernels.lanes import Lanes

P = ParamSpec("P")
R = TypeVar("R")
# The interpreter multiplies bfloat16 numbers as if their bits were integers; there, products are in float32.
WIDE = tl.constexpr(gpu.interpreted())
_PAGE = tl.constexpr(PAGE)
# Programs per multiprocessor: several are resident at once, and a last wave that is not full costs less of them.
_WAVES = 4
# Multiprocessors where there is none to ask (the interpreter): few, so that tests split work in several parts.
_FEW = 2


def at_home(function: Callable[P, R]) -> Callable[P, R]:
    """A function that launches on the GPU where its first tensor lies; Triton itself takes the current one."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = args[0]
        if not isinstance(tensor, Tensor) or not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(tensor.device):
            return function(*args, **kwargs)

    return call


def padded(size: int, least: int = 16) -> int:
    """The power of two that holds ``size``; products of matrices take no side below 16."""
    return max(least, 1 << (size - 1).bit_length())


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _FEW


@cache
def roomy(device: torch.device) -> bool:
    """Whether a multiprocessor has the shared memory of a data centre's GPU, 164 KiB or more; others have 100 KiB."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor >= 164 << 10


def scarce(dim: int, device: torch.device) -> bool:
    """Whether heads are so large that fewer blocks of them than elsewhere fit into the shared memory of this GPU."""
    return dim > 128 and not roomy(device)


def split(units: int, others: int, device: torch.device, least: int = 1) -> tuple[int, int]:
    """How ``units`` of work in a row are cut so that, times ``others``, they fill the GPU: (units each, parts)."""
    wanted = max(1, _WAVES * multiprocessors(device) // max(1, others))
    each = max(least, -(-units // wanted))
    return each, max(1, -(-units // each))


def table(lanes: Lanes, device: torch.device) -> Tensor:
    """Pages [lanes, pages] of each lane in token order, int32 on ``device``; shorter lanes end in page 0."""
    if device not in lanes.tables:
        ids = lanes.pages()
        pages = np.zeros((lanes.count, max(1, *(len(row) for row in ids))), np.int32)
        for row, own in zip(pages, ids, strict=True):
            row[: len(own)] = own
        lanes.tables[device] = uploaded(torch.from_numpy(pages), device)
    return lanes.tables[device]


def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that nobody waits for.

    Raises ValueError during a capture: each replay would copy again, from memory that has become another's by then.
    """
    if device.type != "cuda":
        return tensor.to(device)
    check(
        not torch.cuda.is_current_stream_capturing(), "page tables cannot be captured; make the same call once before"
    )
    return tensor.pin_memory().to(device, non_blocking=True)


def integers(values: Sequence[int], device: torch.device) -> Tensor:
    """``values`` as int32 on the device, without a copy from the host where they are equal or count up by one."""
    first, count = values[0], len(values)
    if all(value == first for value in values):
        return torch.full((count,), first, dtype=torch.int32, device=device)
    if all(value == first + i for i, value in enumerate(values)):
        return torch.arange(first, first + count, dtype=torch.int32, device=device)
    return uploaded(torch.tensor(values, dtype=torch.int32), device)


@triton.jit
def product(a, b, acc):
    """acc + a b in float32; [m, k] by [k, n]."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def rounded(x, pool):
    """Float32 ``x`` as the dtype of a ``pool`` rounds it, halves to even; still float32."""
    if WIDE and pool.dtype.element_ty == tl.bfloat16:
        # The interpreter's own conversion cuts off.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 32767 + ((bits >> 16) & 1)) & -65536
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        return x.to(pool.dtype.element_ty).to(tl.float32)


@triton.jit
def softened(logits, most, total):
    """A block of a running softmax: its weights, what sums so far shrink by, and maximum and total from now on."""
    higher = tl.maximum(most, tl.max(logits, 1))
    weights = tl.exp(logits - higher[:, None])
    shrink = tl.exp(most - higher)
    return weights, shrink, higher, total * shrink + tl.sum(weights, 1)


@triton.jit
def put_part(outs, lses, row, rows, channels, sums, most, total, QUERIES_PER_KV: tl.constexpr, D: tl.constexpr):
    """Stores a part's answers and their log-sum-exp, query heads at ``row``; 0 and -inf where it saw nothing."""
    saw = total > 0
    sums = sums / tl.where(saw, total, 1.0)[:, None]
    lse = tl.where(saw, most + tl.log(tl.where(saw, total, 1.0)), float("-inf"))
    asked = (rows < QUERIES_PER_KV)[:, None] & (channels < D)[None, :]
    tl.store(outs + row[:, None] * D + channels[None, :], sums, mask=asked)
    tl.store(lses + row, lse, mask=rows < QUERIES_PER_KV)


@triton.jit
def capped(logits, softcap):
    """softcap * tanh(logits / softcap), by an exponential: not every build of Triton has a tanh."""
    return softcap - 2.0 * softcap / (tl.exp(2.0 * logits / softcap) + 1.0)


@triton.jit
def rows_of(table, tokens, held):
    """Pool rows (page * 64 + place, 64 bits) of a lane's ``tokens``; ``table`` points to the lane's pages."""
    page = tl.load(table + tokens // _PAGE, mask=held, other=0)
    return page.to(tl.int64) * _PAGE + tokens % _PAGE


@triton.jit
def fetched(pool, rows, channels, held, D: tl.constexpr, DP: tl.constexpr):
    """Rows [n, DP] of a pool of ``D`` channels; 0 where a row is not ``held`` and behind the last channel."""
    places = pool + rows[:, None] * D + channels[None, :]
    # Without the second mask the compiler knows that a row is read in whole vectors.
    if D == DP:
        return tl.load(places, mask=held[:, None], other=0.0)
    else:
        return tl.load(places, mask=held[:, None] & (channels < D)[None, :], other=0.0)


@triton.jit
def partners(channels, pairs, INTERLEAVED: tl.constexpr):
    """For each channel of a rotation of ``pairs`` pairs: its partner, the pair, and the sign of the partner's part.

    Channels behind the last pair are told by ``channels >= 2 * pairs``.
    """
    if INTERLEAVED:
        first = channels % 2 == 0
        partner = tl.where(first, channels + 1, channels - 1)
        pair = channels // 2
    else:
        first = channels < pairs
        partner = tl.where(first, channels + pairs, channels - pairs)
        pair = tl.where(first, channels, channels - pairs)
    rotates = channels < 2 * pairs
    partner = tl.where(rotates, partner, channels)
    return partner, tl.where(rotates, pair, 0), tl.where(first, -1.0, 1.0)


@triton.jit
def rotated(own, other, cos, sin, places, held, channels, pairs, INTERLEAVED: tl.constexpr):
    """Rows rotated by the angles at ``places`` of tables [.., pairs] in float32; ``other`` are the partners' values."""
    _, pair, sign = partners(channels, pairs, INTERLEAVED)
    mask = held[:, None] & (channels < 2 * pairs)[None, :]
    spots = places[:, None] * pairs + pair[None, :]
    c = tl.load(cos + spots, mask=mask, other=1.0)
    s = tl.load(sin + spots, mask=mask, other=0.0)
    return own.to(tl.float32) * c + sign[None, :] * (other.to(tl.float32) * s)
