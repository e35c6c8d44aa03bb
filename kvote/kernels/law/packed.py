"""Packed keys and values by their law, ``kvote.kernels.packing``."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvote.kernels import checks, packing, reference
from kvote.kernels.contract import Angles, PackedPool, Recent, Tail
from kvote.kernels.dense import winners_within
from kvote.kernels.lanes import Lanes
from kvote.kernels.law.pages import behind, listed, ranged, slots
from kvote.kernels.packing import PACKED, Packing

# Tokens that are decoded at a time.
_BLOCK = 4096


def pack(x: Tensor, pages: Tensor, form: Packing, lanes: Lanes, first: list[int]) -> None:
    """Writes tokens ``x`` [lanes, m, d] behind the first ``first[lane]`` tokens of each lane; keys in whole groups,
    unless they are packed by token."""
    checks.packing(x, form, lanes, first)
    packing.pack(x.flatten(0, 1), pages, form, behind(lanes, first, x.shape[1], x.device, PACKED).flatten())


def unpack(pages: Tensor, form: Packing, lanes: Lanes, tokens: Tensor | range, sequences: int, out: Tensor) -> None:
    """Decodes a range of tokens, or ``tokens`` int64 [b, m], of all lanes to ``out`` [lanes, >= m, d]."""
    start, count = checks.tokens_of(tokens, sequences)
    checks.unpacking(out, form, lanes, count)
    if isinstance(tokens, Tensor):
        at = tokens.repeat_interleave(lanes.count // sequences, dim=0)
    else:
        at = torch.arange(start, start + count, device=pages.device).expand(lanes.count, -1)
    decoded = packing.unpack(pages, form, slots(lanes, at, PACKED).flatten())
    out[:, :count] = decoded.view(lanes.count, count, form.dim)


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
    """Attention of one query position per sequence, ``query`` [b, heads, d], over a range of packed tokens and over
    ``recent`` ones: out [b, heads, d] and lse [b, heads], float32."""
    checks.packed_alike(query, keys, values, tokens)
    sequences, heads, _ = query.shape
    checks.queries_per_kv_of(sequences * heads, keys[2], sequences * heads)
    rows, parts = query[:, :, None].float(), []
    for block in _blocks(tokens):
        key, value = (_decoded(held, block, sequences) for held in (keys, values))
        parts.append(reference.attend(rows, key, value, scale=scale, softcap=softcap))
    if recent is not None:
        recent_keys, recent_values, lanes, recent_range = recent
        checks.recent_alike(recent_keys, recent_values, lanes, keys[1], keys[2].count)
        key, value = (
            ranged(pool, lanes, sequences, recent_range.start, recent_range.stop)
            for pool in (recent_keys, recent_values)
        )
        parts.append(reference.attend(rows, key, value, scale=scale, softcap=softcap))
    out, lse = reference.merge(parts)
    return out[:, :, 0], lse[:, :, 0]


def scores(query: Tensor, keys: PackedPool, tokens: range) -> Tensor:
    """q.k [b, heads, r, n] of ``query`` [b, heads, r, d] with a range of packed keys."""
    checks.packed_scoring(query, keys, tokens)
    parts = [reference.scores(query, _decoded(keys, block, len(query))) for block in _blocks(tokens)]
    return torch.cat(parts, dim=-1).transpose(1, 2)


def votes(query: Tensor, keys: PackedPool, tail: Tail, start: int, limits: list[int]) -> Tensor:
    """Soft votes [b, r, n] for tokens ``start`` to ``max(limits)`` of ``query`` [b, heads, r, d]."""
    return voted(scores, query, keys, tail, start, limits)


def select(query: Tensor, keys: PackedPool, tail: Tail, start: int, limits: list[int], k: int) -> Tensor:
    """The ``k`` tokens [b, r, k] with the most ``votes``, ascending."""
    return selected(scores, query, keys, tail, start, limits, k)


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
    """Attention of one query position per sequence, ``query`` [b, heads, d], over a list ``tokens`` int64 [b, m]: out
    [b, heads, d] and lse [b, heads], float32. With ``angles`` [m, r] keys are rotated first."""
    key, value = tokens_listed(unpack, query, keys, values, tail, tokens, angles, interleaved)
    return attended(query, key, value, scale, softcap)


def voted(
    scored: Callable[[Tensor, PackedPool, range], Tensor],
    query: Tensor,
    keys: PackedPool,
    tail: Tail,
    start: int,
    limits: list[int],
) -> Tensor:
    """``votes`` where ``scored`` scores packed keys as ``scores`` does."""
    _, stop = checks.packed_voting(query, keys, tail, start, limits)
    heads, ends = keys[2].count // len(query), list(zip(tail.packed, tail.first, strict=True))

    def of(rows: Tensor, own: Lanes, behind: Lanes, packed: int, first: int) -> Tensor:
        edge, parts = max(start, min(packed, stop)), []
        if edge > start:
            parts.append(scored(rows, (*keys[:2], own), range(start, edge)).transpose(1, 2))
        if stop > edge:
            held = ranged(tail.keys, behind, len(rows), edge - first, stop - first)
            parts.append(reference.scores(rows, held))
        return torch.cat(parts, dim=-1)

    if len(set(ends)) == 1:
        return reference.votes_within(of(query, keys[2], tail.lanes, *ends[0]), start, limits)
    parts = [
        of(query[i : i + 1], keys[2].only(i * heads, heads), tail.lanes.only(i * heads, heads), *own)
        for i, own in enumerate(ends)
    ]
    return reference.votes_within(torch.cat(parts), start, limits)


def selected(
    scored: Callable[[Tensor, PackedPool, range], Tensor],
    query: Tensor,
    keys: PackedPool,
    tail: Tail,
    start: int,
    limits: list[int],
    k: int,
) -> Tensor:
    """``select`` in the same way."""
    checks.winners_of(k, start, limits)
    return winners_within(voted(scored, query, keys, tail, start, limits), start, limits, k)


def attended(query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """What one query position per sequence, ``query`` [b, heads, d], reads in tokens [b, h, m, d]."""
    out, lse = reference.attend(query[:, :, None].float(), key, value, scale=scale, softcap=softcap)
    return out[:, :, 0], lse[:, :, 0]


def tokens_listed(
    decoded: Callable[[Tensor, Packing, Lanes, Tensor, int, Tensor], None],
    query: Tensor,
    keys: PackedPool,
    values: PackedPool,
    tail: Tail,
    tokens: Tensor,
    angles: Angles | None,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Keys, rotated, and values [b, h, m, d] of a list, where ``decoded`` decodes packed tokens as ``unpack`` does. No
    number of a tensor is looked at."""
    m, (sequences, _, dim), lanes = checks.packed_listing(query, keys, values, tail, tokens), query.shape, keys[2]
    packed, first = (torch.tensor(x, device=tokens.device)[:, None] for x in (tail.packed, tail.first))
    late = (tokens >= packed)[:, None, :, None]
    held = []
    for (pages, form, own), recent_range in ((keys, tail.keys), (values, tail.values)):
        part = torch.zeros(lanes.count, m, dim, dtype=form.dtype, device=pages.device)
        if min(tail.packed):
            old = torch.minimum(tokens, packed - 1)
            decoded(pages, form, own, old, sequences, part)
        part = part.view(sequences, -1, m, dim)
        if len(recent_range):
            recent = listed(recent_range, tail.lanes, (tokens - first).clamp(min=0) * (tokens >= packed))
            part = torch.where(late, recent, part)
        held.append(part)
    if angles is not None:
        checks.angles_fit(angles, m, dim)
        held[0] = reference.rotate(held[0], angles[0][:m], angles[1][:m], interleaved=interleaved)
    return held[0], held[1]


def _blocks(tokens: range) -> list[range]:
    return [tokens[i : i + _BLOCK] for i in range(0, max(1, len(tokens)), _BLOCK)]


def _decoded(held: PackedPool, tokens: range, sequences: int) -> Tensor:
    """Some packed tokens, [b, h, n, d]."""
    pages, form, lanes = held
    out = torch.empty(lanes.count, len(tokens), form.dim, dtype=form.dtype, device=pages.device)
    unpack(pages, form, lanes, tokens, sequences, out)
    return out.view(sequences, -1, len(tokens), form.dim)
