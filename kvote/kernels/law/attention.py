"""Attention of queries to tokens that lie side by side or in pages, and the attention that tokens received."""

import torch
from torch import Tensor

from kvote.kernels import checks, fused, reference
from kvote.kernels.choice import forced
from kvote.kernels.contract import Angles
from kvote.kernels.lanes import Lanes
from kvote.kernels.law.pages import listed, ranged
from kvote.kernels.masks import end_aligned

# Float32 logits that the law holds at a time (64 MiB).
LOGITS_HELD = 1 << 24


def why_not_attend(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> None:
    """None: the law answers everything."""


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
    """``reference.attend`` with the mask given as a rule (``masks``), by torch's fused kernel where that can answer and
    nobody asks for the law alone."""
    if forced() != "reference" and fused.why_not(query, key, value, softcap) is None:
        return fused.attend(query, key, value, scale=scale, causal=causal, window=window)
    return _in_rows(query, key, value, scale=scale, softcap=softcap, causal=causal, window=window)


def _in_rows(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, softcap: float | None, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """The law on blocks of rows, so that no logits of all queries by all tokens exist at once."""
    t, m = query.shape[2], key.shape[2]
    rows = max(1, LOGITS_HELD // max(1, query.shape[0] * query.shape[1] * m))
    answers = []
    for start in range(0, t, rows):
        stop = min(t, start + rows)
        seen = m - t + stop if causal else m
        mask = end_aligned(stop - start, seen, window, query.device) if causal else None
        part = query[:, :, start:stop]
        answers.append(
            reference.attend(part, key[:, :, :seen], value[:, :, :seen], scale=scale, mask=mask, softcap=softcap)
        )
    if len(answers) == 1:
        return answers[0]
    return torch.cat([out for out, _ in answers], dim=2), torch.cat([lse for _, lse in answers], dim=2)


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
    """Attention of one query position per sequence, ``query`` [b, heads, d], over a range that all read or int64
    [b, m]: out [b, heads, d] and lse [b, heads], float32. With ``angles`` [m, r] keys are rotated first. ``ends``:
    of a range, each lane's tokens before ``ends[lane]`` only."""
    sequences, heads, dim = query.shape
    checks.queries_per_kv_of(sequences * heads, lanes, heads)
    checks.pair_of_pools(keys, values, dim)
    checks.ends_of(ends, tokens, lanes)
    start, count = checks.tokens_of(tokens, sequences)
    if ends is not None:
        # Lane by lane, each a sequence of one key head.
        rows = query.float().view(lanes.count, -1, 1, dim)
        parts = []
        for i, end in enumerate(ends):
            at = torch.arange(start, max(start, min(end, start + count)), device=query.device)
            own = lanes.only(i)
            key, value = listed(keys, own, at[None]), listed(values, own, at[None])
            if angles is not None:
                key = reference.rotate(key, angles[0][: len(at)], angles[1][: len(at)], interleaved=interleaved)
            parts.append(reference.attend(rows[i : i + 1], key, value, scale=scale, softcap=softcap))
        out, lse = (torch.cat(each).view(sequences, heads, -1) for each in zip(*parts, strict=True))
        return out, lse[..., 0]
    if isinstance(tokens, Tensor):
        key, value = listed(keys, lanes, tokens), listed(values, lanes, tokens)
    else:
        key, value = (ranged(pool, lanes, sequences, start, start + count) for pool in (keys, values))
    if angles is not None:
        checks.angles_fit(angles, count, dim)
        key = reference.rotate(key, angles[0][:count], angles[1][:count], interleaved=interleaved)
    out, lse = reference.attend(query[:, :, None].float(), key, value, scale=scale, softcap=softcap)
    return out[:, :, 0], lse[:, :, 0]


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
    """Attention [b, h, n] that tokens ``start`` to ``max(limits)`` received; ``query`` [b, heads, t, d], ``lse``
    [b, heads, t], row i of t sees tokens before ``limits[i]``."""
    stop = checks.limits_of(limits, query.shape[2], start)
    checks.pool_of_keys(keys, query.shape[3])
    key = ranged(keys, lanes, len(query), start, stop)
    return reference.attention_mass(query, lse, key, start, limits, scale=scale, softcap=softcap)


def why_not_thin(values: Tensor, queries_per_kv: int, kept: int) -> str:
    """The law answers, but with all channels torch's own attention is faster."""
    return "no kernel reads keys with fewer channels there"


def thin_decode(
    query: Tensor, keys: Tensor, values: Tensor, stop: int, *, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of ``query`` [h, g, kept] over the first ``stop`` tokens, ``keys`` [h, pages, kept, PAGE], ``values``
    [h, n, dv]: out [h, g, dv] and lse [h, g], float32."""
    checks.thin(query, keys, values, stop)
    rows = keys.transpose(2, 3).flatten(1, 2)[None, :, :stop]
    heads = query.float().flatten(0, 1)[None, :, None]
    out, lse = reference.attend(heads, rows, values[None, :, :stop], scale=scale, softcap=softcap)
    return out.view(*query.shape[:2], -1), lse.view(query.shape[:2])
