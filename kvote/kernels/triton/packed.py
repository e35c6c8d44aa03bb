"""Packed keys and values on a GPU: attention and scores straight from the codes (``pack`` writes them). Contracts as in
``kvote.kernels.contract``, layout and law in ``kvote.kernels.packing``.

Codes become numbers in registers, each rounded once to the model's dtype, as the law decodes them; nothing decoded is
ever written to memory. A thread takes whole words apart, so its codes are neighbours and go on to the matrix units in
whole vectors: keys as tokens by channels, values as channels by tokens. Blocks of tokens never cross a page, so a
page's place is asked for once per block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvote.kernels import checks
from kvote.kernels.contract import Angles, PackedPool, Recent, Tail
from kvote.kernels.law.packed import attended, selected, tokens_listed, voted
from kvote.kernels.packing import PACKED, Packing
from kvote.kernels.triton.common import at_home, capped, padded, product, put_part, softened, split
from kvote.kernels.triton.decode import MAX_QUERIES_PER_KV, decode_parts
from kvote.kernels.triton.merge import merge_parts
from kvote.kernels.triton.pack import pack, pool, unpack
from kvote.kernels.triton.products import put_scores

__all__ = ["MAX_QUERIES_PER_KV", "attend", "decode", "pack", "scores", "select", "unpack", "votes"]

_PACKED = tl.constexpr(PACKED)
# Words in a row of codes.
_LANES = tl.constexpr(16)
# Pages that a program reads at least, and rows of a product of scores at most.
_LEAST = 2
_ROWS = 64


@triton.jit
def _codes(words, rows, first, held, WIDTH: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Codes [rows, COUNT * steps], in float32, of ``COUNT`` words from ``first`` on of each of ``rows``, which are
    tokens of keys or channels of values and have ``WIDTH`` words in a page; 0 where a word is not ``held``."""
    word = first + tl.arange(0, COUNT)
    places = (rows // _LANES * WIDTH)[:, None] + word[None, :]
    x = tl.load(words + places * _LANES + (rows % _LANES)[:, None], mask=held, other=0)
    # Each line halves the codes that are still in one number; the last pair to part are neighbours (``packing.py``).
    x = tl.join(x, x >> 8)
    if BITS < 8:
        x = tl.join(x, x >> 4)
    if BITS < 4:
        x = tl.join(x, x >> 2)
    x = tl.reshape(tl.join(x, x >> 16), [rows.shape[0], COUNT * (32 // BITS)]) & ((1 << BITS) - 1)
    # As the last bits of 2^23 in float32: conversions of integers are slow.
    return (x | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _by_row(codes, places, held, COUNT: tl.constexpr, SPANS: tl.constexpr):
    """Numbers that ``codes`` [rows, m] stand for, in float32, where ``SPANS`` groups of rows have scales [SPANS, m] at
    ``places``, and ``COUNT`` further their minima."""
    ROWS: tl.constexpr = codes.shape[0]
    COLUMNS: tl.constexpr = codes.shape[1]
    scale = tl.load(places, mask=held, other=0.0).to(tl.float32)
    least = tl.load(places + COUNT, mask=held, other=0.0).to(tl.float32)
    grouped = tl.reshape(codes, [SPANS, ROWS // SPANS, COLUMNS])
    return tl.reshape(grouped * scale[:, None, :] + least[:, None, :], [ROWS, COLUMNS])


@triton.jit
def _by_column(codes, places, held, COUNT: tl.constexpr, SPANS: tl.constexpr):
    """The same where groups are of columns: scales [rows, SPANS] at ``places``."""
    ROWS: tl.constexpr = codes.shape[0]
    COLUMNS: tl.constexpr = codes.shape[1]
    scale = tl.load(places, mask=held, other=0.0).to(tl.float32)
    least = tl.load(places + COUNT, mask=held, other=0.0).to(tl.float32)
    grouped = tl.reshape(codes, [ROWS, SPANS, COLUMNS // SPANS])
    return tl.reshape(grouped * scale[:, :, None] + least[:, :, None], [ROWS, COLUMNS])


@triton.jit
def _key_block(
    words,
    scales,
    page,
    place,
    D: tl.constexpr,
    DP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    COUNT: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys [BLOCK, DP] of the tokens from ``place`` on of a page, as they decode; finite behind the last channel,
    anything where no token is."""
    SIZE: tl.constexpr = scales.dtype.element_ty.primitive_bitwidth // 8
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    BYTES: tl.constexpr = CODES + 2 * COUNT * SIZE
    WIDTH: tl.constexpr = D * BITS // 32
    WORDS: tl.constexpr = DP * BITS // 32
    token, channel = place + tl.arange(0, BLOCK), tl.arange(0, DP)
    held = (tl.arange(0, WORDS) < WIDTH)[None, :]
    codes = _codes(words + page * (BYTES // 4), token, 0, held, WIDTH, BITS, WORDS)
    scales += page * (BYTES // SIZE) + CODES // SIZE
    SIDE: tl.constexpr = DP if BY_TOKEN else BLOCK
    SPANS: tl.constexpr = SIDE // GROUP if GROUP < SIDE else 1
    span = tl.arange(0, SPANS)
    if BY_TOKEN:
        places = scales + span[None, :] * _PACKED + token[:, None]
        key = _by_column(codes, places, (span < GROUPS)[None, :], COUNT, SPANS)
    else:
        places = scales + (place // GROUP + span)[:, None] * D + channel[None, :]
        key = _by_row(codes, places, (channel < D)[None, :], COUNT, SPANS)
    return key.to(scales.dtype.element_ty)


@triton.jit
def _value_block(
    words,
    scales,
    page,
    place,
    held,
    D: tl.constexpr,
    DP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Values [DP, BLOCK] of the tokens from ``place`` on of a page, as they decode; 0 for tokens that are not ``held``,
    anything behind the last channel."""
    SIZE: tl.constexpr = scales.dtype.element_ty.primitive_bitwidth // 8
    GROUPS: tl.constexpr = (D + GROUP - 1) // GROUP
    BYTES: tl.constexpr = CODES + 2 * COUNT * SIZE
    SPANS: tl.constexpr = DP // GROUP if GROUP < DP else 1
    STEPS: tl.constexpr = 32 // BITS
    token, channel, span = place + tl.arange(0, BLOCK), tl.arange(0, DP), tl.arange(0, SPANS)
    there = (channel < D)[:, None]
    codes = _codes(words + page * (BYTES // 4), channel, place // STEPS, there, _PACKED // STEPS, BITS, BLOCK // STEPS)
    places = scales + page * (BYTES // SIZE) + CODES // SIZE + span[:, None] * _PACKED + token[None, :]
    value = _by_row(codes, places, (span < GROUPS)[:, None] & held[None, :], COUNT, SPANS)
    return value.to(scales.dtype.element_ty)


@triton.jit(do_not_specialize=("kv_heads", "key_width", "value_width", "start", "stop", "each", "slots"))
def _packed_attend(
    query,
    key_words,
    key_scales,
    key_pages,
    value_words,
    value_scales,
    value_pages,
    stops,
    outs,
    lses,
    kv_heads,
    key_width,
    value_width,
    start,
    stop,
    each,
    slots,
    scale,
    softcap,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BITS: tl.constexpr,
    KEY_GROUP: tl.constexpr,
    KEY_COUNT: tl.constexpr,
    VALUE_GROUP: tl.constexpr,
    VALUE_COUNT: tl.constexpr,
    CODES: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    # As in decoding from uncompressed pages, the query heads of a key head are the rows of one product.
    part, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, channels = tl.arange(0, ROWS), tl.arange(0, DP)
    asked = (rows < GROUPS)[:, None] & (channels < D)[None, :]
    q = tl.load(query + (lane * GROUPS + rows)[:, None] * D + channels[None, :], mask=asked, other=0.0)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DP], tl.float32)
    begin = start // BLOCK * BLOCK + part * each
    end = tl.minimum(begin + each, stop)
    if RAGGED:
        end = tl.minimum(end, tl.load(stops + lane // kv_heads))
    # Every block that is read holds a token, so the maximum is finite from the first one on.
    end = tl.where(end > start, end, begin)
    for done in range(0, end - begin, BLOCK):
        at = begin + done
        place, token = at % _PACKED, at + tl.arange(0, BLOCK)
        held = (token >= start) & (token < end)
        page = tl.load(key_pages + lane * key_width + at // _PACKED).to(tl.int64)
        key = _key_block(key_words, key_scales, page, place, D, DP, BITS, KEY_GROUP, CODES, KEY_COUNT, BY_TOKEN, BLOCK)
        logits = product(q, tl.trans(key), tl.zeros([ROWS, BLOCK], tl.float32)) * scale
        if SOFTCAP:
            logits = capped(logits, softcap)
        logits = tl.where(held[None, :], logits, float("-inf"))
        weights, shrink, most, total = softened(logits, most, total)
        page = tl.load(value_pages + lane * value_width + at // _PACKED).to(tl.int64)
        value = _value_block(
            value_words, value_scales, page, place, held, D, DP, BITS, VALUE_GROUP, CODES, VALUE_COUNT, BLOCK
        )
        sums = product(weights.to(value.dtype), tl.trans(value), sums * shrink[:, None])
    row = (lane * GROUPS + rows) * slots + part
    put_part(outs, lses, row, rows, channels, sums, most, total, GROUPS, D)


@triton.jit(do_not_specialize=("table_width", "rows", "start", "stop"))
def _packed_scores(
    query,
    words,
    scales,
    pages,
    scores,
    table_width,
    rows,
    start,
    stop,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
    COUNT: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane, at = tl.program_id(1).to(tl.int64), start // BLOCK * BLOCK + tl.program_id(0) * BLOCK
    token = at + tl.arange(0, BLOCK)
    page = tl.load(pages + lane * table_width + at // _PACKED).to(tl.int64)
    key = _key_block(words, scales, page, at % _PACKED, D, DP, BITS, GROUP, CODES, COUNT, BY_TOKEN, BLOCK)
    held = (token >= start) & (token < stop)
    put_scores(query, scores, lane, rows, tl.trans(key), token, held, start, stop, ROWS, D, DP)


def _shape(form: Packing) -> tuple[int, int]:
    """Tokens at a time, and warps: what is decoded of a block lies in registers, and float32 products take many."""
    return (16, 8) if form.dtype == torch.float32 else (64 if form.dim <= 128 else 32, 4)


@at_home
def attend(
    query: Tensor,
    keys: PackedPool,
    values: PackedPool,
    tokens: range,
    *,
    recent: Recent | None = None,
    scale: float,
    softcap: float | None,
    stops: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As in the contract: out [sequences, heads, d] and lse [sequences, heads] in float32 over a range of packed
    tokens, and over ``recent`` ones.

    ``query`` [sequences, heads, d], head = h_kv * g + i, is rounded to the dtype of the model; lanes are (sequence, key
    head) in that order. ``stops`` int32 [sequences], on the device: sequence i reads its packed tokens before
    ``stops[i]`` only. A sequence that reads nothing answers 0 with an lse of -inf. Raises ValueError for what would be
    read wrongly.
    """
    (_, form, lanes), (_, value_form, _) = keys, values
    sequences, heads, dim = query.shape
    groups, device = checks.queries_per_kv_of(sequences * heads, lanes, MAX_QUERIES_PER_KV), query.device
    checks.packed_alike(query, keys, values, tokens)
    key_words, key_scales, key_pages = pool(*keys)
    value_words, value_scales, value_pages = pool(*values)
    query, (block, warps) = query.to(form.dtype).contiguous(), _shape(form)
    pages = -(-max(0, tokens.stop - tokens.start // block * block) // PACKED)
    each, parts = split(pages, lanes.count, device, least=_LEAST)
    if recent is None:
        outs = torch.empty(sequences, heads, parts, dim, dtype=torch.float32, device=device)
        lses = torch.empty(sequences, heads, parts, dtype=torch.float32, device=device)
    else:
        checks.recent_alike(*recent[:3], form, lanes.count)
        outs, lses = decode_parts(query, *recent, scale=scale, softcap=softcap, parts_before=parts)
    _packed_attend[(parts, lanes.count)](
        query,
        key_words,
        key_scales,
        key_pages,
        value_words,
        value_scales,
        value_pages,
        key_pages if stops is None else stops,
        outs,
        lses,
        lanes.count // sequences,
        key_pages.shape[1],
        value_pages.shape[1],
        tokens.start,
        tokens.stop,
        each * PACKED,
        outs.shape[2],
        scale,
        softcap or 0.0,
        GROUPS=groups,
        ROWS=padded(groups),
        D=dim,
        DP=padded(dim),
        BITS=form.bits,
        KEY_GROUP=form.group_size,
        KEY_COUNT=form.scale_count,
        VALUE_GROUP=value_form.group_size,
        VALUE_COUNT=value_form.scale_count,
        CODES=form.code_bytes,
        BY_TOKEN=form.by_token,
        BLOCK=block,
        RAGGED=stops is not None,
        SOFTCAP=softcap is not None,
        num_warps=warps,
        num_stages=4,
    )
    return merge_parts(outs, lses)


@at_home
def scores(query: Tensor, keys: PackedPool, tokens: range) -> Tensor:
    """As in the contract: q.k [sequences, heads, r, n] in float32 of ``query`` [sequences, heads, r, d] with a
    range of packed keys. Float32 queries meet 16-bit keys in two parts, as in ``votes``. Raises ValueError for what
    would be read wrongly."""
    _, form, lanes = keys
    sequences, heads, r, dim = query.shape
    rows = checks.packed_scoring(query, keys, tokens)
    words, scales, pages = pool(*keys)
    query, (block, warps) = query.float().contiguous(), _shape(form)
    out = torch.empty(sequences, heads, r, len(tokens), dtype=torch.float32, device=query.device)
    if not out.numel():
        return out
    _packed_scores[(-(-(tokens.stop - tokens.start // block * block) // block), lanes.count)](
        query,
        words,
        scales,
        pages,
        out,
        pages.shape[1],
        rows,
        tokens.start,
        tokens.stop,
        ROWS=min(_ROWS, padded(rows)),
        D=dim,
        DP=padded(dim),
        BITS=form.bits,
        GROUP=form.group_size,
        CODES=form.code_bytes,
        COUNT=form.scale_count,
        BY_TOKEN=form.by_token,
        BLOCK=block,
        num_warps=warps,
    )
    return out


def votes(query: Tensor, keys: PackedPool, tail: Tail, start: int, limits: list[int]) -> Tensor:
    """As in the contract; packed keys are scored from their codes, the rest is torch."""
    return voted(scores, query, keys, tail, start, limits)


def select(query: Tensor, keys: PackedPool, tail: Tail, start: int, limits: list[int], k: int) -> Tensor:
    """As in the contract, by ``votes``."""
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
    """As in the contract; tokens are decoded by ``unpack``, the rest is torch."""
    key, value = tokens_listed(unpack, query, keys, values, tail, tokens, angles, interleaved)
    return attended(query, key, value, scale, softcap)
