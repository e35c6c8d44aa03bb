"""Random tokens in pages on a GPU, what reads them, and the law that says whether it reads them right."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvote.kernels import packing, reference
from kvote.kernels import triton as fast
from kvote.kernels.contract import PackedPool
from kvote.kernels.lanes import Lanes
from kvote.kernels.packing import PACKED, Packing
from kvote.measure.check import law_of

PAGE = 64
BASE = 1e6
# Codes of packed tokens, numbers in a group, and tokens that the law packs or decodes at a time.
PACKED_BITS, GROUP, _AT_ONCE = (2, 4), 32, 1 << 16
# Errors that rounding to bfloat16 leaves, relative to the largest number of the answer; in votes, relative to each.
ATTENTION, VOTES = 0.02, 0.005


@dataclass(frozen=True)
class Sizes:
    """Qwen2-7B's attention and TokenSelect's lists, unless told otherwise."""

    heads: int = 28
    kv_heads: int = 4
    dim: int = 128
    sinks: int = 128
    top_k: int = 2048
    window: int = 512
    chunk: int = 512

    @property
    def scale(self) -> float:
        return float(self.dim**-0.5)

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys of a token, and as many of its values."""
        return 2 * self.kv_heads * self.dim


class Work:
    """``batch`` sequences of ``tokens`` random tokens, bfloat16, keys at position 0. A multiple of 64 tokens."""

    def __init__(self, sizes: Sizes, tokens: int, batch: int, device: torch.device) -> None:
        self.sizes, self.tokens, self.batch, self.device = sizes, tokens, batch, device
        pages, lanes = tokens // PAGE, batch * sizes.kv_heads
        self.lanes = Lanes([[(i * pages, pages)] for i in range(lanes)])
        self.keys, self.values = (self._random(lanes * pages) for _ in range(2))
        frequencies = BASE ** (-torch.arange(0, sizes.dim, 2, device=device) / sizes.dim)
        places = torch.arange(sizes.sinks + sizes.top_k + sizes.window + 2 * sizes.chunk, device=device)
        angles = places[:, None] * frequencies
        self.cos, self.sin = angles.cos(), angles.sin()
        self.sketches: dict[int, Tensor] = {}

    def _random(self, pages: int) -> Tensor:
        pool = torch.empty(pages, PAGE, self.sizes.dim, dtype=torch.bfloat16, device=self.device)
        for some in pool.split(1 << 14):
            some.normal_()
        return pool

    def plain(self, pool: Tensor) -> Tensor:
        """The same memory as [batch, kv_heads, tokens, dim]: no lane is scattered here."""
        return pool.view(self.batch, self.sizes.kv_heads, self.tokens, self.sizes.dim)

    def query(self, rows: int) -> Tensor:
        """Random queries [batch, heads, rows, dim] at position 0, small enough for votes not to be all one token's."""
        shape = self.batch, self.sizes.heads, rows, self.sizes.dim
        return (2 * self.sizes.scale**0.5 * torch.randn(shape, device=self.device)).bfloat16()

    def sketch(self, bits: int) -> Tensor | None:
        if bits and bits not in self.sketches:
            size = len(self.keys), fast.sketch_bytes(self.sizes.dim, bits)
            self.sketches[bits] = torch.empty(size, dtype=torch.uint8, device=self.device)
            fast.sketch(self.keys, self.sketches[bits], bits, self.lanes, 0, self.tokens)
        return self.sketches.get(bits)

    # Packed tokens.

    def packed(self, bits: int) -> tuple[PackedPool, PackedPool]:
        """Keys and values in ``bits``, written by the law. A multiple of 128 tokens."""
        pages, lanes = self.tokens // PACKED, self.batch * self.sizes.kv_heads
        table = Lanes([[(i * pages, pages)] for i in range(lanes)])
        both = []
        for pool, are_keys in ((self.keys, True), (self.values, False)):
            form = Packing(bits, GROUP, self.sizes.dim, pool.dtype, are_keys)
            held = torch.empty(lanes * pages, form.page_bytes, dtype=torch.uint8, device=self.device)
            for slots in self._slots():
                packing.pack(pool.view(-1, self.sizes.dim)[slots], held, form, slots)
            both.append((held, form, table))
        return both[0], both[1]

    def _slots(self) -> tuple[Tensor, ...]:
        """All tokens, lane after lane, some at a time."""
        return torch.arange(len(self.keys) * PAGE, device=self.device).split(_AT_ONCE)

    def decoded(self, packed: PackedPool) -> Tensor:
        """Packed tokens as the law decodes them: [batch, kv_heads, tokens, dim]."""
        pages, form, _ = packed
        return self.plain(torch.cat([packing.unpack(pages, form, slots) for slots in self._slots()]))

    def read_packed(self, query: Tensor, packed: tuple[PackedPool, PackedPool]) -> Tensor:
        out, _ = fast.packed.attend(query[:, :, 0], *packed, range(self.tokens), scale=self.sizes.scale, softcap=None)
        return out

    def rotated(self, query: Tensor, first: int) -> Tensor:
        """Queries [batch, heads, rows, dim] at positions from ``first`` on."""
        places = slice(first, first + query.shape[2])
        return fast.rotate(query, (self.cos[None, places], self.sin[None, places]), False)

    def select(self, query: Tensor, edge: int, bits: int = 0) -> Tensor:
        """Winners [batch, 1, top_k] among the tokens up to ``edge``."""
        sizes, nominate = self.sizes, max(4096, 4 * self.sizes.top_k) if bits == 4 else 0
        scoring = self.rotated(query, sizes.window).float().mean(dim=2, keepdim=True)
        given = scoring, self.keys, self.lanes, self.sketch(bits), bits, sizes.sinks, [edge], sizes.top_k, nominate
        return fast.select(*given)

    def listed(self, winners: Tensor, edge: int) -> Tensor:
        """Sinks, winners and all from ``edge`` on: [batch, 1, m]."""
        ends = torch.arange(self.sizes.sinks, device=self.device), torch.arange(edge, self.tokens, device=self.device)
        sinks, local = (x.expand(self.batch, 1, -1) for x in ends)
        return torch.cat([sinks, winners, local], dim=-1).contiguous()

    # One chunk of a prompt.

    def chunk_list(self, query: Tensor, reach: int, bits: int = 0) -> Tensor:
        edge = self.tokens - reach
        return self.listed(self.select(query, edge, bits), edge)

    def chunk_over(self, query: Tensor, index: Tensor) -> Tensor:
        """Attention of a chunk over a list: fetched and rotated, then read."""
        sizes, m = self.sizes, index.shape[-1]
        shape = self.batch, 1, sizes.kv_heads, m, sizes.dim
        key, value = (torch.empty(shape, dtype=self.keys.dtype, device=self.device) for _ in range(2))
        fast.gather(self.keys, self.values, self.lanes, index, (self.cos[:m], self.sin[:m]), False, (key, value))
        placed = self.rotated(query, m - query.shape[2])
        return fast.attend(placed, key[:, 0], value[:, 0], scale=sizes.scale, causal=True)[0]

    def chunk(self, query: Tensor, reach: int, bits: int = 0) -> Tensor:
        """One prefill chunk of TokenSelect; the local context reaches back ``reach`` tokens from the chunk's end."""
        return self.chunk_over(query, self.chunk_list(query, reach, bits))

    # One generated token.

    def step(self, query: Tensor, bits: int = 0) -> Tensor:
        """A decode step of TokenSelect that selects anew."""
        edge = self.tokens - self.sizes.window
        return self.read_list(query, self.listed(self.select(query, edge, bits), edge))

    def read_list(self, query: Tensor, index: Tensor) -> Tensor:
        m = index.shape[-1]
        angles = self.cos[:m], self.sin[:m]
        return self._decode(self.rotated(query, m - 1), index[:, 0], angles)

    def dense(self, query: Tensor) -> Tensor:
        return self._decode(query, range(self.tokens), None)

    def _decode(self, query: Tensor, tokens: Tensor | range, angles: Any) -> Tensor:
        out, _ = fast.decode(
            query[:, :, 0],
            self.keys,
            self.values,
            self.lanes,
            tokens,
            angles=angles,
            interleaved=False,
            scale=self.sizes.scale,
            softcap=None,
        )
        return out

    # torch, to be compared with.

    def baselines(self, query: Tensor) -> dict[str, Callable[[], Tensor]]:
        """torch's flash attention over all tokens, called in the two ways there are; the faster one counts.

        No mask: the last rows of a causal chunk would see the same, the first 511 tokens less.
        """
        key, value, scale = self.plain(self.keys), self.plain(self.values), self.sizes.scale
        b, heads, rows, dim = query.shape
        packed = query.reshape(b, self.sizes.kv_heads, heads // self.sizes.kv_heads * rows, dim)

        def flash(asked: Tensor, **options: Any) -> Tensor:
            if self.device.type == "cpu":
                return sdpa(asked, key, value, scale=scale, **options)
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
                return sdpa(asked, key, value, scale=scale, **options)

        return {
            "query heads as rows": lambda: flash(packed).reshape(query.shape),
            "enable_gqa": lambda: flash(query, enable_gqa=True),
        }


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.empty, but what nobody writes shows."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        made = make(*args, **kwargs)
        return made.fill_(math.nan if made.dtype.is_floating_point else 85)

    return call


def check(work: Work) -> dict[str, float]:
    """Errors of every kernel against the law in float32, fresh random queries each. Stops at last if one is too large,
    or if something does not run at all, so that one call tells all that is wrong."""
    errors: dict[str, float] = {}
    with mock.patch.object(torch, "empty", poisoned(torch.empty)):
        for part in (_check_votes, _check_decoding, _check_packed, _check_lists, _check_torch):
            _take(part, work, errors)
    wrong = {name: e for name, e in errors.items() if not e <= (VOTES if name[0] in "vw" else ATTENTION)}
    if wrong:
        raise SystemExit(f"Wrong answers: {wrong} (relative to the largest number of the right one); no figures.")
    return errors


def _take(part: Callable[[Work], Iterator[tuple[str, float]]], work: Work, errors: dict[str, float]) -> None:
    try:
        errors.update(part(work))
    except Exception as error:
        errors[f"{part.__name__[7:]}, {type(error).__name__}: {error}"] = math.inf


def _check_votes(work: Work) -> Iterator[tuple[str, float]]:
    sizes, key = work.sizes, work.plain(work.keys)
    edge = work.tokens - sizes.window
    for bits in (0, 8, 4):
        scoring = work.rotated(work.query(1), sizes.window).float()
        keys = key[:, :, sizes.sinks : edge]
        if bits:
            keys = reference.sketched(keys - reference.centre(key, PAGE), bits)
        law = reference.soft_votes(reference.scores(scoring, keys))
        given = scoring, work.keys, work.lanes, work.sketch(bits), bits, sizes.sinks, [edge]
        mine = fast.votes(*given)
        yield f"votes, {bits or 16} bits", float(((mine - law).abs() / law.clamp(min=1e-9)).max())
        winners = fast.select(*given, sizes.top_k)[:, 0] - sizes.sinks
        least = law[:, 0].topk(sizes.top_k).values.amin(-1, keepdim=True)
        missed = float((1 - law[:, 0].gather(-1, winners) / least.clamp(min=1e-30)).max())
        ascending = bool((winners.diff() > 0).all())
        yield f"winners, {bits or 16} bits", max(0.0, missed) if ascending else math.inf


def _check_decoding(work: Work) -> Iterator[tuple[str, float]]:
    sizes, key, value = work.sizes, work.plain(work.keys), work.plain(work.values)
    edge, query = work.tokens - sizes.window, work.query(1)
    yield "dense decode", _off(work.dense(query), law_of(query, key, value, sizes.scale)[:, :, 0])
    channels = slice(0, max(1, sizes.dim // 16))
    labels = work.keys[..., channels].transpose(1, 2).contiguous()
    scored = fast.label_scores(query[..., channels], labels, work.lanes, sizes.sinks, edge)
    law = reference.scores(query[..., channels], key[:, :, sizes.sinks : edge, channels])
    yield "scores of labels", _off(scored, law)


def _check_packed(work: Work) -> Iterator[tuple[str, float]]:
    for bits in PACKED_BITS:
        query, packed = work.query(1), work.packed(bits)
        decoded = [work.decoded(each) for each in packed]
        law = law_of(query, *decoded, work.sizes.scale)[:, :, 0]
        yield f"packed decode, {bits} bits", _off(work.read_packed(query, packed), law)
        law = reference.scores(query, decoded[0]).transpose(1, 2)
        yield f"packed scores, {bits} bits", _off(fast.packed.scores(query, packed[0], range(work.tokens)), law)
        yield f"wrong bytes, packed and unpacked, {bits} bits", _written(work, packed)


def _written(work: Work, packed: tuple[PackedPool, PackedPool]) -> float:
    """How many bytes of pages are not the law's, or numbers decoded from them; the last tokens are packed apart."""
    wrong = 0
    for (law, form, lanes), raw in zip(packed, (work.keys, work.values), strict=True):
        mine = torch.full_like(law, 85)
        x, cut = work.plain(raw).flatten(0, 1), work.tokens - (GROUP if form.are_keys else 1)
        fast.packed.pack(x[:, :cut], mine, form, lanes, [0] * lanes.count)
        fast.packed.pack(x[:, cut:], mine, form, lanes, [cut] * lanes.count)
        decoded = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        fast.packed.unpack(law, form, lanes, range(work.tokens), work.batch, decoded)
        wrong += int((mine != law).sum()) + int((decoded != work.decoded((law, form, lanes)).flatten(0, 1)).sum())
    return float(wrong)


def _check_lists(work: Work) -> Iterator[tuple[str, float]]:
    sizes = work.sizes
    edge = work.tokens - sizes.window
    for bits in (0, 4):
        query = work.query(1)
        index = work.listed(work.select(query, edge, bits), edge)
        placed, values = _listed(work, index)
        rotated = work.rotated(query, index.shape[-1] - 1)
        law = law_of(rotated, placed, values, sizes.scale)[:, :, 0]
        yield f"list decode, {bits or 16} bits", _off(work.read_list(query, index), law)
    query = work.query(sizes.chunk)
    index = work.chunk_list(query, sizes.chunk)
    placed, values = _listed(work, index)
    m = index.shape[-1]
    mask = torch.ones(sizes.chunk, m, dtype=torch.bool, device=work.device).tril(m - sizes.chunk)
    law = reference.attend(work.rotated(query, m - sizes.chunk).float(), placed, values, scale=sizes.scale, mask=mask)[
        0
    ]
    yield "chunk over a list", _off(work.chunk_over(query, index), law)


def _check_torch(work: Work) -> Iterator[tuple[str, float]]:
    key, value, query = work.plain(work.keys), work.plain(work.values), work.query(1)
    for name, call in work.baselines(query).items():
        yield f"torch, {name}", _off(call(), law_of(query, key, value, work.sizes.scale))


def _listed(work: Work, index: Tensor) -> tuple[Tensor, Tensor]:
    """Keys at their places in the list, rounded as the kernels round them, and values."""
    m = index.shape[-1]
    places = index[:, :, :, None].expand(-1, work.sizes.kv_heads, -1, work.sizes.dim)
    key = reference.rotate(work.plain(work.keys).gather(2, places), work.cos[:m], work.sin[:m])
    return key.float(), work.plain(work.values).gather(2, places).float()


def _off(mine: Tensor, law: Tensor) -> float:
    return float((mine.float() - law).abs().max() / law.abs().max())
