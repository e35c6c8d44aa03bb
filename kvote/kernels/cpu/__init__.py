"""The C++ kernels, as functions of tensors. Contracts as in ``kvote.kernels.reference``; addresses never escape.

SIMD is chosen when the module loads (AVX-512 with BF16 and VNNI, AVX-512 with VNNI, AVX2, or plain C++ for the compiler
to vectorise), threads follow ``torch.get_num_threads()``. The module links against the same OpenMP runtime that torch
has loaded, so both share one pool of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

# torch must be imported first: it brings the OpenMP runtime.
try:
    from kvote.kernels.cpu import _cpu  # type: ignore[attr-defined]

    _missing: str | None = None
except ImportError as error:
    _missing = f"the compiled module cannot be loaded ({error}); reinstall kvote with a C++ compiler at hand"

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SKETCH_TOKENS = 32
MAX_GROUPS = 16
_MAX_DIM = 256
_PAGE = 64
Angles = tuple[Tensor, Tensor]


class Lanes:
    """Where the tokens of some lanes lie: for each, runs (first page, pages) of neighbours in a pool.

    Held by whoever owns the pool for as long as the pages do not change hands.
    """

    __slots__ = ("address", "begins", "count", "runs", "tables")

    def __init__(self, runs: Sequence[Sequence[tuple[int, int]]]) -> None:
        self.count = len(runs)
        self.runs = np.array([run for lane in runs for run in lane], np.int64).reshape(-1, 2)
        self.begins = np.cumsum([0, *(len(lane) for lane in runs)], dtype=np.int64)
        self.address = (self.runs.ctypes.data, self.begins.ctypes.data, self.count)
        # The same as the kernels of a GPU read it: a page table per device.
        self.tables: dict[torch.device, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> Lanes:
        # Never changed once made, and a copy's addresses would be those of the original's arrays.
        return self


def _check(holds: bool, what: str) -> None:
    """The kernels trust their arguments; what would make them read elsewhere is refused here."""
    if not holds:
        raise ValueError(f"kvote.kernels.cpu: {what}.")


def why_not(tensor: Tensor | None = None) -> str | None:
    """The reason these kernels cannot read ``tensor`` (or cannot run at all), or None."""
    if _missing is not None or tensor is None:
        return _missing
    if tensor.device.type != "cpu":
        return f"tensors are on {tensor.device.type}"
    if tensor.dtype not in _TYPES:
        return f"{tensor.dtype} is not read"
    if tensor.shape[-1] % 16 or tensor.shape[-1] > 256:
        return f"the head size {tensor.shape[-1]} is not a multiple of 16 up to 256"
    return None


def instruction_set() -> str:
    """The instruction set in use: avx512_bf16, avx512, avx2 or scalar."""
    return str(_cpu.instruction_set())


def instruction_sets() -> list[str]:
    """Those that this machine can run, fastest last."""
    return list(_cpu.instruction_sets())


def use(instruction_set: str) -> bool:
    """Forces an instruction set (for tests); False if this machine has not got it."""
    return bool(_cpu.use(instruction_set))


def sketch_bytes(dim: int, bits: int) -> int:
    """Bytes of the sketch of ``SKETCH_TOKENS`` tokens: codes of ``bits`` and one half-precision scale each."""
    return SKETCH_TOKENS * (dim * bits // 8 + 2)


def use_large_pages(tensor: Tensor) -> None:
    """Asks the system for large pages behind a fresh tensor, which scattered reads need; harmless where it refuses."""
    if _missing is None and tensor.device.type == "cpu":
        _cpu.use_large_pages(tensor.data_ptr(), tensor.nbytes)


def votes(
    query: Tensor, keys: Tensor, lanes: Lanes, sketch: Tensor | None, bits: int, start: int, limits: list[int]
) -> Tensor:
    """Soft votes [r, n] of one sequence for tokens ``start`` to ``max(limits)``.

    ``query`` [heads, r, d] float32, head = h_kv * g + i; ``keys`` a pool [pages, PAGE, d]; one lane per key head;
    ``sketch`` the pool's sketches of ``bits``, or None for exact scores; selecting query j votes on tokens before
    ``limits[j]``. Weights from a sketch carry 11 bits.
    """
    heads, selections, dim = query.shape
    stop = max(limits)
    _check(keys.is_contiguous() and keys.shape[-1] == dim, "keys must be a contiguous pool of the query's head size")
    _check(0 <= start < stop, "there must be candidates")
    query = query.float().contiguous()
    _check(len(limits) == selections, "there must be one limit per selecting query")
    out = torch.empty(selections, stop - start)
    _cpu.votes(
        query.data_ptr(),
        keys.data_ptr(),
        _TYPES[keys.dtype],
        *lanes.address,
        0 if sketch is None else sketch.data_ptr(),
        bits,
        heads // lanes.count,
        selections,
        dim,
        start,
        stop,
        limits,
        out.data_ptr(),
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
) -> Tensor:
    """The ``k`` tokens [r, k] with the most ``votes``, ascending, ties to the lower one; arguments as there.

    With ``nominate``, votes from the sketch nominate that many tokens (fewer where there are no more), which are
    scored again with their keys; votes counted with those scores decide among them (``reference.rescored``).
    """
    heads, selections, dim = query.shape
    fewest = min(limits) - start
    _check(keys.is_contiguous() and keys.shape[-1] == dim, "keys must be a contiguous pool of the query's head size")
    _check(len(limits) == selections, "there must be one limit per selecting query")
    _check(start >= 0 and 0 < k <= fewest, f"cannot take {k} of {fewest} candidates")
    query = query.float().contiguous()
    out = torch.empty(selections, k, dtype=torch.int64)
    _cpu.select(
        query.data_ptr(),
        keys.data_ptr(),
        _TYPES[keys.dtype],
        *lanes.address,
        0 if sketch is None else sketch.data_ptr(),
        bits,
        heads // lanes.count,
        selections,
        dim,
        start,
        max(limits),
        limits,
        k,
        min(max(nominate, k), fewest) if nominate else 0,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def top_k(votes: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest of ``votes`` [..., n] float32, ascending; ties go to the lower index."""
    votes = votes.float().contiguous()
    n = votes.shape[-1]
    _check(0 < k <= n, f"cannot take {k} of {n} votes")
    out = torch.empty(*votes.shape[:-1], k, dtype=torch.int64)
    _cpu.top_k(votes.data_ptr(), votes.numel() // n, n, k, out.data_ptr(), torch.get_num_threads())
    return out


def gather(
    keys: Tensor,
    values: Tensor,
    lanes: Lanes,
    index: Tensor,
    angles: Angles,
    interleaved: bool,
    out: tuple[Tensor, Tensor],
) -> None:
    """Writes the tokens ``index`` [m] of one sequence to ``out`` [h, m, d] each, keys rotated by ``angles`` [m, r]."""
    cos, sin = (a.float().contiguous() for a in angles)
    _check(index.dtype == torch.int64 and index.is_contiguous(), "index must be contiguous int64")
    _check(
        all(o.is_contiguous() and o.dtype == keys.dtype for o in out), "out must be contiguous and of the keys' dtype"
    )
    _cpu.gather(
        keys.data_ptr(),
        values.data_ptr(),
        _TYPES[keys.dtype],
        *lanes.address,
        keys.shape[-1],
        index.shape[0],
        index.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[-1],
        interleaved,
        out[0].data_ptr(),
        out[1].data_ptr(),
        torch.get_num_threads(),
    )


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
) -> tuple[Tensor, Tensor]:
    """Attention of one query position per sequence: out [sequences, heads, d] and lse [sequences, heads], float32.

    ``query`` [sequences, heads, d], head = h_kv * g + i; lanes are (sequence, key head) in that order. ``tokens``: a
    range that all read, or int64 [sequences, m], ascending in each; with ``angles`` [m, r] keys are rotated as they
    are read. As ``reference.attend``; the same bits for any number of threads.
    """
    sequences, heads, dim = query.shape
    groups = sequences * heads // lanes.count
    _check(groups <= MAX_GROUPS, f"more than {MAX_GROUPS} query heads share a key head")
    _check(keys.shape == values.shape and keys.shape[-1] == dim, "keys and values must be pools of the same head size")
    if isinstance(tokens, Tensor):
        _check(tokens.dtype == torch.int64 and tokens.is_contiguous(), "tokens must be contiguous int64")
        _check(tokens.shape[0] == sequences, "there must be one list per sequence")
        index, start, count = tokens.data_ptr(), 0, tokens.shape[1]
    else:
        index, start, count = 0, tokens.start, len(tokens)
    query = query.float().contiguous()
    out, lse = torch.empty(sequences, heads, dim), torch.empty(sequences, heads)
    cos, sin = (a.float().contiguous() for a in angles) if angles else (query, query)
    _cpu.decode(
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        _TYPES[keys.dtype],
        *lanes.address,
        groups,
        dim,
        index,
        lanes.count // sequences,
        start,
        count,
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[-1] if angles else 0,
        interleaved,
        scale,
        softcap or 0.0,
        out.data_ptr(),
        lse.data_ptr(),
        torch.get_num_threads(),
    )
    return out, lse


def turn(x: Tensor, angles: Angles, interleaved: bool) -> Tensor:
    """``reference.rotate`` of ``x`` [sequences, heads, n, d], channels contiguous, by ``angles`` [n, r] or
    [sequences or 1, n, r] in float32."""
    sequences, heads, count, dim = x.shape
    cos, sin = angles
    _check(cos.is_contiguous() and sin.is_contiguous() and cos.dtype == torch.float32, "angles must be float32 rows")
    _check(x.stride(-1) == 1 and cos.shape[-2] == count and 2 * cos.shape[-1] <= dim, "angles must fit the rows")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _cpu.turn(
        x.data_ptr(),
        _TYPES[x.dtype],
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
    """Writes tokens ``key`` [sequences, h, t, d], ``value`` [sequences, h, t, dv] and ``positions`` [sequences, t]
    to the pools (keys, values, positions) behind the first ``first[lane]`` tokens of each lane, and sketches them."""
    sequences, heads, count, dim = key.shape
    keys, values, slot_positions = pools
    _check(key.stride(-1) == 1 and value.stride(-1) == 1, "channels must be contiguous")
    _check(key.dtype == keys.dtype and value.dtype == values.dtype == keys.dtype, "dtypes must be those of the pools")
    _check(positions.dtype == torch.int64 and positions.stride(-1) == 1, "positions must be int64 rows")
    _check(lanes.count == len(first) == sequences * heads, "there must be one lane per sequence and key head")
    _cpu.append(
        key.data_ptr(),
        value.data_ptr(),
        _TYPES[keys.dtype],
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


def sketch(keys: Tensor, sketch: Tensor, bits: int, slots: Tensor) -> None:
    """Encodes the tokens at pool ``slots`` of ``keys`` [pages, PAGE, d] into ``sketch`` [pages, bytes]."""
    _cpu.sketch(
        keys.data_ptr(),
        _TYPES[keys.dtype],
        sketch.data_ptr(),
        bits,
        keys.shape[-1],
        slots.data_ptr(),
        len(slots),
        torch.get_num_threads(),
    )


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
    """``reference.attention_mass`` [sequences, h, n] of tokens ``start`` to ``max(limits)``, read from the pages.

    ``query`` [sequences, heads, t, d] and its ``lse`` [sequences, heads, t]; row i of t sees tokens before
    ``limits[i]``.
    """
    sequences, heads, t, dim = query.shape
    h, stop = lanes.count // sequences, max(limits)
    _check(len(limits) == t and 0 <= start < stop, "there must be one limit per query row, and tokens to see")
    rows = heads // h * t
    query, lse = query.float().reshape(-1, rows, dim).contiguous(), lse.float().contiguous()
    out = torch.empty(sequences, h, stop - start)
    _cpu.attention_mass(
        query.data_ptr(),
        lse.data_ptr(),
        keys.data_ptr(),
        _TYPES[keys.dtype],
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


def scores(query: Tensor, keys: Tensor, lanes: Lanes, start: int, stop: int) -> Tensor:
    """``reference.scores`` [sequences, r, heads, stop - start], read from a pool of keys [pages, PAGE, d].

    ``query`` [sequences, heads, r, d], head = h_kv * g + i; lanes are (sequence, key head) in that order.
    """
    return _scores(_cpu.scores, query, keys, keys.shape[2], lanes, start, stop)


def label_scores(query: Tensor, labels: Tensor, lanes: Lanes, start: int, stop: int) -> Tensor:
    """The same from a pool of labels [pages, r, PAGE], channels before tokens, of any number of channels."""
    return _scores(_cpu.label_scores, query, labels, labels.shape[1], lanes, start, stop)


def _scores(
    kernel: Callable[..., None], query: Tensor, pool: Tensor, channels: int, lanes: Lanes, start: int, stop: int
) -> Tensor:
    sequences, heads, r, dim = query.shape
    _check(pool.is_contiguous() and channels == dim, "keys must be a contiguous pool of the query's channels")
    _check(
        0 <= start < stop and (sequences * heads) % lanes.count == 0, "there must be tokens, and a lane for each head"
    )
    query = query.float().contiguous()
    out = torch.empty(sequences, heads, r, stop - start)
    kernel(
        query.data_ptr(),
        pool.data_ptr(),
        _TYPES[pool.dtype],
        *lanes.address,
        sequences * heads * r // lanes.count,
        dim,
        start,
        stop,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out.transpose(1, 2)


def thin_decode(
    query: Tensor, keys: Tensor, values: Tensor, stop: int, *, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of one query position over the first ``stop`` tokens of one sequence whose keys lie channel by channel:
    out [h, g, dv] and lse [h, g], float32.

    ``query`` [h, g, kept], ``keys`` [h, pages, kept, PAGE], ``values`` [h, n, dv]. As ``reference.attend`` with keys
    [h, n, kept]; the same bits for any number of threads.
    """
    h, groups, kept = query.shape
    pages, tokens, dim = keys.shape[1], values.shape[1], values.shape[2]
    _check(groups <= MAX_GROUPS, f"more than {MAX_GROUPS} query heads share a key head")
    _check(keys.is_contiguous() and values.is_contiguous(), "keys and values must be contiguous")
    _check(keys.shape == (h, pages, kept, _PAGE) and len(values) == h, "keys must be pages of the query's channels")
    _check(keys.dtype == values.dtype and keys.dtype in _TYPES, "keys and values must be of one known dtype")
    _check(dim % 16 == 0 and max(dim, kept) <= _MAX_DIM, f"head sizes must be up to {_MAX_DIM}, of values by 16")
    _check(0 < stop <= min(tokens, pages * _PAGE), f"cannot read {stop} of {tokens} tokens")
    stride = -(-kept // 32) * 32
    rows = torch.nn.functional.pad(query.float(), (0, stride - kept)).contiguous()
    out, lse = torch.empty(h, groups, dim), torch.empty(h, groups)
    _cpu.thin_decode(
        rows.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        _TYPES[keys.dtype],
        h,
        groups,
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


def read_all(memory: Tensor) -> None:
    """Reads a tensor and does nothing with it: what these kernels can at best reach, to measure them against."""
    _cpu.read_all(memory.data_ptr(), memory.nbytes, torch.get_num_threads())
