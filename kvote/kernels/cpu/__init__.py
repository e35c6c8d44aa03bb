"""The C++ kernels, as functions of tensors. Contracts as in ``kvote.kernels.reference``; addresses never escape.

SIMD is chosen when the module loads (AVX-512 with VNNI, AVX2, or plain C++ for the compiler to vectorise), threads
follow ``torch.get_num_threads()``. The module links against the same OpenMP runtime that torch has loaded, so both
share one pool of threads.
"""

from __future__ import annotations

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
SKETCH_TOKENS = 16
MAX_GROUPS = 16


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
    """The instruction set in use: avx512, avx2 or scalar."""
    return str(_cpu.instruction_set())


def use(instruction_set: str) -> bool:
    """Forces an instruction set (for tests); False if this machine has not got it."""
    return bool(_cpu.use(instruction_set))


def sketch_bytes(dim: int) -> int:
    """Bytes of an 8-bit sketch of 16 tokens: codes and one half-precision scale each."""
    return SKETCH_TOKENS * dim + 2 * SKETCH_TOKENS


def votes(
    query: Tensor,
    keys: Tensor,
    runs: np.ndarray,
    begins: list[int],
    sketch: Tensor | None,
    start: int,
    limits: list[int],
) -> Tensor:
    """Soft votes [r, n] of one sequence for tokens ``start`` to ``max(limits)``.

    ``query`` [heads, r, d] float32, head = h_kv * g + i; ``keys`` a pool [pages, PAGE, d]; lane h lies in
    ``runs[begins[h]:begins[h + 1]]``; selecting query j votes on tokens before ``limits[j]``.
    """
    heads, selections, dim = query.shape
    groups = heads // (len(begins) - 1)
    _check(keys.is_contiguous() and keys.shape[-1] == dim, "keys must be a contiguous pool of the query's head size")
    _check(0 <= start < max(limits), "there must be candidates")
    query = query.float().contiguous()
    edges = np.asarray(limits, np.int64)
    out = torch.empty(selections, max(limits) - start)
    _cpu.votes(
        query.data_ptr(),
        keys.data_ptr(),
        _TYPES[keys.dtype],
        runs.ctypes.data,
        begins,
        0 if sketch is None else sketch.data_ptr(),
        groups,
        selections,
        dim,
        start,
        max(limits),
        edges.ctypes.data,
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
    runs: np.ndarray,
    begins: list[int],
    index: Tensor,
    angles: tuple[Tensor, Tensor],
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
        runs.ctypes.data,
        begins,
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
    runs: np.ndarray,
    begins: list[int],
    tokens: Tensor | range,
    *,
    angles: tuple[Tensor, Tensor] | None,
    interleaved: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention of one query position over ``tokens`` of equally long lanes: out [heads, d] and lse [heads], float32.

    ``query`` [heads, d] with head = lane * groups + i, lane l in ``runs[begins[l]:begins[l + 1]]``. ``tokens`` is a
    range, or int64 [m] ascending; with ``angles`` [m, r] keys are rotated as they are read. As ``reference.attend``.
    """
    heads, dim = query.shape
    lanes = len(begins) - 1
    _check(heads // lanes <= MAX_GROUPS, f"more than {MAX_GROUPS} query heads share a key head")
    _check(keys.shape == values.shape and keys.shape[-1] == dim, "keys and values must be pools of the same head size")
    if isinstance(tokens, Tensor):
        _check(tokens.dtype == torch.int64 and tokens.is_contiguous(), "tokens must be contiguous int64")
    query = query.float().contiguous()
    threads = torch.get_num_threads()
    # Enough parts that threads finish together, each long enough to be worth merging.
    parts = max(1, min(-(-4 * threads // lanes), len(tokens) // 256))
    out, lse = torch.empty(heads, dim), torch.empty(heads)
    cos, sin = (a.float().contiguous() for a in angles) if angles else (query, query)
    _cpu.decode(
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        _TYPES[keys.dtype],
        runs.ctypes.data,
        begins,
        heads // lanes,
        dim,
        tokens.data_ptr() if isinstance(tokens, Tensor) else 0,
        0 if isinstance(tokens, Tensor) else tokens.start,
        len(tokens),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.shape[-1] if angles else 0,
        interleaved,
        scale,
        softcap or 0.0,
        parts,
        out.data_ptr(),
        lse.data_ptr(),
        threads,
    )
    return out, lse


def sketch(keys: Tensor, sketch: Tensor, slots: Tensor) -> None:
    """Encodes the tokens at pool ``slots`` of ``keys`` [pages, PAGE, d] into ``sketch`` [pages, PAGE // 16, bytes]."""
    threads = torch.get_num_threads()
    _cpu.sketch(
        keys.data_ptr(), _TYPES[keys.dtype], sketch.data_ptr(), keys.shape[-1], slots.data_ptr(), len(slots), threads
    )
