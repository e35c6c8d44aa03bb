"""Tokens that lie side by side: each call goes to the backend that is to read its tensors."""

import torch
from torch import Tensor

from kvote.kernels import cpu, reference
from kvote.kernels.choice import backend, chosen, named


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``reference.attend`` with the mask given as a rule: rows are the last entries of the list (``masks``).

    ``query`` [b, heads, t, d], ``key`` [b, h, m, d], ``value`` [b, h, m, dv] to out [b, heads, t, dv] and lse
    [b, heads, t].
    """
    reads = chosen(query, key)
    if reads.why_not_attend(query, key, value, softcap) is not None:
        reads = named("reference")
    return reads.attend(query, key, value, scale=scale, softcap=softcap, causal=causal, window=window)


def attention_mass(
    query: Tensor,
    lse: Tensor,
    key: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """``reference.attention_mass`` [b, h, m] with the mask given as a rule, as in ``attend``; ``lse`` is that of all
    tokens that a row reads, of which ``key`` may hold only some."""
    t, m = query.shape[2], key.shape[2]
    limits = list(range(m - t + 1, m + 1)) if causal else [m] * t
    return reference.attention_mass(query, lse, key, 0, limits, scale=scale, softcap=softcap, window=window)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """``reference.rotate``; ``x`` [..., n, d], ``cos`` and ``sin`` [n or 1, r] or [b, 1, n, r]."""
    rows = (cos.dim() == 2 and cos.shape[0] == x.shape[-2]) or (
        cos.dim() == x.dim() == 4 and cos.shape[1] == 1 and cos.shape[0] in (1, x.shape[0])
    )
    if not rows or x.stride(-1) != 1 or cos.dtype != torch.float32:
        return reference.rotate(x, cos, sin, interleaved=interleaved)
    if cos.dim() == 4:
        cos, sin = cos.squeeze(1), sin.squeeze(1)
    flat = x if x.dim() == 4 else x.reshape(1, -1, *x.shape[-2:])
    rotated = chosen(x).rotate(flat, (cos.contiguous(), sin.contiguous()), interleaved)
    return rotated if x.dim() == 4 else rotated.reshape(x.shape)


def top_k(votes: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k largest of ``votes`` [..., n], ascending; where the C++ kernel runs, equal votes go to
    the lower index."""
    if votes.device.type == "cpu" and backend() == "cpu":
        return cpu.top_k(votes, k)
    return reference.top_k(votes, k)


def winners_within(votes: Tensor, start: int, limits: list[int], k: int) -> Tensor:
    """The ``k`` tokens [b, r, k] with the most of ``votes`` [b, r, n] on tokens from ``start`` on, ascending; query j
    takes from those before ``limits[j]``."""
    return top_k(reference.forbid(votes, start, limits), k) + start
