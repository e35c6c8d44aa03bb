"""Packed keys and values by their law, ``kvote.kernels.packing``."""

import torch
from torch import Tensor

from kvote.kernels import checks, packing, reference
from kvote.kernels.contract import PackedPool, Recent
from kvote.kernels.lanes import Lanes
from kvote.kernels.law.pages import behind, ranged, slots
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
    checks.groups_of(sequences * heads, keys[2], sequences * heads)
    rows, parts = query[:, :, None].float(), []
    for block in _blocks(tokens):
        key, value = (_decoded(held, block, sequences) for held in (keys, values))
        parts.append(reference.attend(rows, key, value, scale=scale, softcap=softcap))
    if recent is not None:
        raw_keys, raw_values, lanes, raw = recent
        checks.recent_alike(raw_keys, raw_values, lanes, keys[1], keys[2].count)
        key, value = (ranged(pool, lanes, sequences, raw.start, raw.stop) for pool in (raw_keys, raw_values))
        parts.append(reference.attend(rows, key, value, scale=scale, softcap=softcap))
    out, lse = reference.merge(parts)
    return out[:, :, 0], lse[:, :, 0]


def scores(query: Tensor, keys: PackedPool, tokens: range) -> Tensor:
    """q.k [b, heads, r, n] of ``query`` [b, heads, r, d] with a range of packed keys."""
    checks.packed_scoring(query, keys, tokens)
    parts = [reference.scores(query, _decoded(keys, block, len(query))) for block in _blocks(tokens)]
    return torch.cat(parts, dim=-1).transpose(1, 2)


def _blocks(tokens: range) -> list[range]:
    return [tokens[i : i + _BLOCK] for i in range(0, max(1, len(tokens)), _BLOCK)]


def _decoded(held: PackedPool, tokens: range, sequences: int) -> Tensor:
    """Some packed tokens, [b, h, n, d]."""
    pages, form, lanes = held
    out = torch.empty(lanes.count, len(tokens), form.dim, dtype=form.dtype, device=pages.device)
    unpack(pages, form, lanes, tokens, sequences, out)
    return out.view(sequences, -1, len(tokens), form.dim)
