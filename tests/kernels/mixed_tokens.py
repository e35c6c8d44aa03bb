"""Packed tokens with raw ones behind them, and what "equals the law" means for the kernels that read both."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from comparisons import close, in_order, rounding
from packs import PackCase, Packs
from paged import Paged, guarding
from torch import Tensor

from kvote.kernels import cpu, packing, reference
from kvote.kernels.contract import Tail
from kvote.kernels.cpu import packed


@dataclass(frozen=True)
class Mixed:
    """The tokens of ``pack``, and ``behind`` more that are not packed; ``apart``: sequences are packed up to different
    tokens."""

    pack: PackCase
    behind: int
    apart: bool = False

    @property
    def n(self) -> int:
        return self.pack.case.n + self.behind


class MixedTokens:
    """``key`` and ``value`` [sequences, heads, n, d] as both pools hold them. Raw lanes begin some tokens before the
    last that is packed; those are other ones there, so that it is seen which are read."""

    def __init__(self, mixed: Mixed) -> None:
        case, self.n = mixed.pack.case, mixed.n
        self.packs = Packs(mixed.pack)
        shorter = [7 * i * mixed.apart for i in range(case.sequences)]
        self.packed = [max(0, case.n - less) for less in shorter]
        self.first = [max(0, n - case.seed % 70) for n in self.packed]
        self.raw = Paged(replace(case, n=max(1, self.n - min(self.first)), size=1.0, seed=case.seed + 1))
        self.keys, self.values = self.packs.of_keys(), self.packs.of_values()
        self.key, self.value = (
            self._whole(*pair) for pair in ((self.keys, self.raw.key), (self.values, self.raw.value))
        )

    def _whole(self, held: Any, raw: Tensor) -> Tensor:
        pool, form, _ = held
        case = self.packs.case
        codes = packing.unpack(pool, form, self.packs.slots(range(case.n)).flatten())
        return self.joined(codes.view(case.sequences, case.heads, -1, case.d), raw, 2)

    def joined(self, old: Tensor, raw: Tensor, dim: int) -> Tensor:
        """What belongs to packed tokens, and what belongs to those of the raw pool, for every token once."""
        rows = []
        for i, (packed_until, first) in enumerate(zip(self.packed, self.first, strict=True)):
            late = raw[i : i + 1].narrow(dim, packed_until - first, self.n - packed_until)
            rows.append(torch.cat([old[i : i + 1].narrow(dim, 0, packed_until), late], dim=dim))
        return torch.cat(rows)

    @property
    def tail(self) -> Tail:
        return Tail(self.raw.keys, self.raw.values, self.raw.table(), self.packed, self.first)

    def query(self, rows: int) -> Tensor:
        """Queries [sequences, heads, rows, d] whose scores are of the size of logits."""
        case = self.packs.case
        return (case.scale * self.raw.query(rows)).to(case.dtype).float()

    def some_tokens(self, count: int) -> Tensor:
        """Lists [sequences, count], ascending."""
        lists = [torch.randperm(self.n, generator=self.raw.random)[:count] for _ in self.packed]
        return torch.stack(lists).sort(dim=-1).values

    @cached_property
    def most(self) -> tuple[float, float]:
        """The largest key and value, as numbers and as norms of rows."""
        return float(self.key.float().norm(dim=-1).max()), float(self.value.float().abs().max())


@guarding
def votes_equal_the_law(mixed: Mixed, start: int, limits: list[int]) -> list[Tensor]:
    held = MixedTokens(mixed)
    query = held.query(len(limits))
    got = packed.votes(query, held.keys, held.tail, start, limits)
    old, slack = held.packs.logits(query, range(mixed.pack.case.n))
    late = reference.scores(query, held.raw.key).transpose(1, 2).double()
    logits = held.joined(old, late, 3).transpose(1, 2)[..., start : max(limits)]
    expected = reference.votes_within(logits.float(), start, limits)
    slack += 3e-7 * float(query.norm(dim=-1).max()) * held.most[0]
    # Where scores are rounded, weights carry 10 bits.
    rtol = (2e-3 if held.packs.rounds else 2e-5) + 4 * slack
    close(got, expected, rtol=rtol, atol=1e-36 * mixed.pack.case.heads * mixed.pack.case.groups)
    return [got]


@guarding
def winners_win_the_vote(mixed: Mixed, start: int, limits: list[int], k: int) -> list[Tensor]:
    """Winners are exactly those of ``votes``, which has a law of its own."""
    held = MixedTokens(mixed)
    given = held.query(len(limits)), held.keys, held.tail, start, limits
    got, votes = packed.select(*given, k), packed.votes(*given)
    for i in range(len(got)):
        for row, own, limit in zip(got[i], votes[i], limits, strict=True):
            assert torch.equal(row, in_order(own[: limit - start], k) + start)
    return [got]


@guarding
def list_equals_the_law(mixed: Mixed, count: int, pairs: int, interleaved: bool, softcap: float | None) -> list[Tensor]:
    """Attention over a list of its own for each sequence, with keys rotated to their places in it."""
    held, case = MixedTokens(mixed), mixed.pack.case
    query, tokens = held.query(1)[:, :, 0], held.some_tokens(count)
    angles = held.raw.angles(count, pairs=pairs) if pairs else None
    rule: dict[str, Any] = {"scale": 1.0, "softcap": softcap}
    out, lse = packed.decode(
        query, held.keys, held.values, held.tail, tokens, angles=angles, interleaved=interleaved, **rule
    )
    at = tokens[:, None, :, None].expand(-1, case.heads, -1, case.d)
    key, value = held.key.gather(2, at), held.value.gather(2, at)
    key = reference.rotate(key, *angles, interleaved=interleaved) if angles else key
    expected, total = reference.attend(query[:, :, None], key.float(), value.float(), **rule)
    largest = float(query.norm(dim=-1).max()) * held.most[0]
    slack = 3e-6 * largest
    if case.dtype != torch.float32:
        # A turned key may round to either neighbour.
        slack += largest * rounding(case.dtype) if pairs else 0.0
    close(lse, total[:, :, 0], rtol=1e-5, atol=1e-5 + slack)
    # One instruction set weighs bfloat16 values with bfloat16 weights.
    paired = case.dtype == torch.bfloat16 and cpu.instruction_set() == "avx512_bf16" and case.d % 64 == 0
    weight = rounding(torch.bfloat16) if paired else 0.0
    close(out, expected[:, :, 0], rtol=1e-5, atol=2e-5 + (slack + weight) * held.most[1])
    return [out, lse]
