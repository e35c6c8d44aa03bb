"""Checks of kernel arguments, once for all backends: ValueError for whatever would make a kernel read or write
elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvote.kernels.contract import Angles, PackedPool, Tail
from kvote.kernels.lanes import PAGE, Lanes
from kvote.kernels.packing import Packing


def check(holds: bool, what: str) -> None:
    """Raises ValueError, which says ``what`` must hold, unless it does."""
    if not holds:
        raise ValueError(f"kvote.kernels: {what}.")


def queries_per_kv_of(query_heads: int, lanes: Lanes, most: int) -> int:
    """Query heads per lane, ``most`` of them at most, of ``query_heads`` of all sequences."""
    queries_per_kv = query_heads // lanes.count
    if queries_per_kv > most or queries_per_kv * lanes.count != query_heads:
        check(queries_per_kv * lanes.count == query_heads, "every key head must have as many query heads")
        check(False, f"more than {most} query heads share a key head")
    return queries_per_kv


def tokens_of(tokens: Tensor | range, sequences: int) -> tuple[int, int]:
    """The first token of a range, or 0 for lists [sequences, m]; and the number of tokens that each sequence reads."""
    if isinstance(tokens, range):
        check(tokens.step == 1 and tokens.start >= 0, "tokens must be consecutive")
        return tokens.start, len(tokens)
    check(tokens.dtype == torch.int64 and tokens.is_contiguous(), "tokens must be contiguous int64")
    check(tokens.shape[0] == sequences, "there must be one list per sequence")
    return 0, tokens.shape[1]


def ends_of(ends: Sequence[int] | None, tokens: Tensor | range, lanes: Lanes) -> None:
    """There is an end for each lane, if any, and a range that it ends."""
    if ends is not None:
        check(isinstance(tokens, range), "lists have no ends")
        check(len(ends) == lanes.count, "there must be one end per lane")


def pair_of_pools(keys: Tensor, values: Tensor, dim: int) -> None:
    """Keys and values are pools of pages, both with the head size ``dim``."""
    shape = keys.shape
    if values.shape != shape or shape[2] != dim:
        check(False, "keys and values must be pools of the same head size")
    if shape[1] != PAGE or not keys.is_contiguous() or not values.is_contiguous():
        check(False, "pools must be contiguous pages")


def pool_of_keys(keys: Tensor, dim: int) -> None:
    """Keys are a pool of pages with the head size ``dim``."""
    check(
        keys.is_contiguous() and keys.shape[1:] == (PAGE, dim), "keys must be contiguous pages of the query's head size"
    )


def angles_fit(angles: Angles, places: int, dim: int) -> None:
    """Checks that there are angles for each of ``places``, for at most ``dim`` channels."""
    cos, sin = angles
    rows, pairs = cos.shape[-2:]
    if rows < places or 2 * pairs > dim or sin.shape != cos.shape:
        check(False, "angles must fit the tokens and their channels")


def rotation(x: Tensor, angles: Angles) -> None:
    """Rows ``x`` [b, heads, n, d] can be rotated by ``angles`` as they are."""
    cos, sin = angles
    check(cos.is_contiguous() and sin.is_contiguous() and cos.dtype == torch.float32, "angles must be float32 rows")
    check(x.stride(-1) == 1 and cos.shape[-2] == x.shape[2] and 2 * cos.shape[-1] <= x.shape[3], "angles must fit x")


def limits_of(limits: Sequence[int], rows: int, start: int) -> int:
    """The last of ``limits``, one per query row, behind ``start``."""
    stop = max(limits)
    check(len(limits) == rows and 0 <= start < stop, "there must be one limit per query row, and candidates before it")
    return stop


def winners_of(k: int, start: int, limits: Sequence[int]) -> int:
    """How many candidates the query with the fewest has, of which ``k`` are to be taken."""
    fewest = min(limits) - start
    if not 0 < k <= fewest:
        check(False, f"cannot take {k} of {fewest} candidates")
    return fewest


def scoring(query: Tensor, pool: Tensor, channels: int, lanes: Lanes, start: int, stop: int) -> int:
    """Query rows per lane of ``query`` [b, heads, r, d] that scores tokens of a ``pool`` of so many channels."""
    sequences, heads, r, dim = query.shape
    check(pool.is_contiguous() and channels == dim, "keys must be a contiguous pool of the query's channels")
    rows = sequences * heads // lanes.count * r
    holds = 0 <= start <= stop and rows * lanes.count == sequences * heads * r
    check(holds, "there must be tokens, and a lane for each head")
    return rows


def sketching(keys: Tensor, sketch: Tensor, start: int, stop: int) -> None:
    """Tokens of a pool of ``keys`` can be sketched."""
    check(keys.is_contiguous() and sketch.is_contiguous(), "keys and sketches must be contiguous")
    check(0 <= start <= stop, "there must be tokens")


def appending(
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    pools: tuple[Tensor, Tensor, Tensor],
    lanes: Lanes,
    first: Sequence[int],
) -> None:
    """Tokens can be written to the pools."""
    keys, values, _ = pools
    check(key.stride(-1) == 1 and value.stride(-1) == 1, "channels must be contiguous")
    check(key.dtype == keys.dtype and value.dtype == values.dtype == keys.dtype, "dtypes must be those of the pools")
    check(positions.dtype == torch.int64 and positions.stride(-1) == 1, "positions must be int64 rows")
    every = lanes.count == len(first) == key.shape[0] * key.shape[1]
    check(every, "there must be one lane per sequence and key head")


def gathering(keys: Tensor, values: Tensor, index: Tensor, out: tuple[Tensor, Tensor], angles: Angles) -> None:
    """Listed tokens can be written to ``out``."""
    check(index.dtype == torch.int64 and index.is_contiguous(), "index must be contiguous int64")
    check(all(o.is_contiguous() and o.dtype == keys.dtype for o in out), "out must be contiguous, of the keys' dtype")
    check(keys.shape == values.shape, "keys and values must be pools of the same head size")
    own = angles[0].dim() == 2 or angles[0].shape[:-1] == index.shape
    check(own and angles[0].shape[-2] == index.shape[-1], "angles must be of each place, or of each token")


def packed_pool(pages: Tensor, form: Packing) -> None:
    """Pages are a pool of the form."""
    check(form.width == form.dim, "the head size must be a multiple of 16")
    check(pages.is_contiguous() and pages.shape[-1] == form.page_bytes, "pages must be a contiguous pool of the form")


def packing(x: Tensor, form: Packing, lanes: Lanes, first: Sequence[int]) -> None:
    """Tokens ``x`` [lanes, m, d] can be packed behind the ``first`` ones."""
    check(x.shape[0] == lanes.count == len(first), "there must be as many lanes as tokens are given for")
    check(x.stride(-1) == 1 and x.dtype == form.dtype, "channels must be contiguous and of the dtype of the form")
    check(x.shape[2] == form.dim, "tokens must have the head size of the form")
    alone = form.by_token or not form.are_keys
    check(alone or not any(n % form.group_size for n in (x.shape[1], *first)), "keys come in whole groups")


def unpacking(out: Tensor, form: Packing, lanes: Lanes, count: int) -> None:
    """``out`` [lanes, >= count, d] takes decoded tokens."""
    check(out.dtype == form.dtype and out.shape[0] == lanes.count, "out must be of the dtype of the form, by lanes")
    check(out.shape[1] >= count and out.shape[2] == form.dim, "out must have room for the tokens")
    check(out.stride(1) == form.dim and out.stride(2) == 1, "out must be contiguous but for its lanes")


def packed_alike(query: Tensor, keys: PackedPool, values: PackedPool, tokens: range) -> None:
    """A query can read packed keys and values together."""
    (_, form, lanes), (_, value_form, value_lanes) = keys, values
    check(form.dim == value_form.dim == query.shape[-1], "keys and values must have the query's head size")
    check(form.dtype == value_form.dtype and form.bits == value_form.bits, "keys and values must be alike")
    check(form.are_keys and not value_form.are_keys, "keys must be keys and values values")
    check(value_lanes.count == lanes.count, "values must have as many lanes as keys")
    check(tokens.step == 1 and tokens.start >= 0, "tokens must be consecutive")


def recent_alike(keys: Tensor, values: Tensor, lanes: Lanes, form: Packing, count: int) -> None:
    """Uncompressed tokens of ``count`` lanes go with packed ones of the form."""
    check(keys.shape == values.shape and keys.shape[-1] == form.dim, "recent tokens must have the head size")
    check(keys.dtype == values.dtype == form.dtype, "recent tokens must be of the dtype of the form")
    check(keys.is_contiguous() and values.is_contiguous(), "recent tokens must be in contiguous pools")
    check(lanes.count == count, "recent tokens must be of as many lanes")


def tail_alike(tail: Tail, keys: PackedPool, sequences: int) -> None:
    """Uncompressed tokens go behind packed ones of so many sequences."""
    _, form, lanes = keys
    recent_alike(tail.keys, tail.values, tail.lanes, form, lanes.count)
    check(tail.keys.shape[1] == PAGE, "recent tokens must be in pages")
    check(len(tail.packed) == len(tail.first) == sequences, "there must be one end of what is packed per sequence")
    check(all(0 <= a <= b for a, b in zip(tail.first, tail.packed, strict=True)), "no token may lie between the pools")


def packed_voting(query: Tensor, keys: PackedPool, tail: Tail, start: int, limits: Sequence[int]) -> tuple[int, int]:
    """Query heads per lane of ``query`` [b, heads, r, d] that votes on packed keys, and the last of its limits."""
    sequences, _, r, _ = query.shape
    rows = packed_scoring(query, keys, range(start, max(limits)))
    tail_alike(tail, keys, sequences)
    return rows // r, limits_of(limits, r, start)


def packed_listing(query: Tensor, keys: PackedPool, values: PackedPool, tail: Tail, tokens: Tensor) -> int:
    """How many tokens a list has that ``query`` [b, heads, d] reads in packed keys and values and behind them."""
    packed_alike(query, keys, values, range(0))
    tail_alike(tail, keys, len(query))
    return tokens_of(tokens, len(query))[1]


def packed_scoring(query: Tensor, keys: PackedPool, tokens: range) -> int:
    """Query rows per lane of ``query`` [b, heads, r, d] that scores packed keys."""
    _, form, lanes = keys
    sequences, heads, r, dim = query.shape
    rows = sequences * heads // lanes.count * r
    check(rows * lanes.count == sequences * heads * r, "every key head must have as many query heads")
    check(form.are_keys and form.dim == dim, "keys must be keys of the query's head size")
    check(tokens.step == 1 and tokens.start >= 0, "tokens must be consecutive")
    return rows


def thin(query: Tensor, keys: Tensor, values: Tensor, stop: int) -> None:
    """``query`` [h, g, kept] can read the first ``stop`` tokens of keys that lie channel by channel."""
    h, _, kept = query.shape
    pages, tokens = keys.shape[1], values.shape[1]
    check(keys.is_contiguous() and values.is_contiguous(), "keys and values must be contiguous")
    check(keys.shape == (h, pages, kept, PAGE) and len(values) == h, "keys must be pages of the query's channels")
    check(keys.dtype == values.dtype, "keys and values must be of one known dtype")
    if not 0 < stop <= min(tokens, pages * PAGE):
        check(False, f"cannot read {stop} of {tokens} tokens")
