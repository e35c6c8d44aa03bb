"""Packed keys and values over a pool of pages, and what "equals the law" means for the kernels that read them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from paged import PAGE, Case, Paged, cases, guarded, guarding, intact
from torch import Tensor

from kvote.kernels import cpu, packing, reference
from kvote.kernels.cpu import packed
from kvote.kernels.lanes import Lanes
from kvote.kernels.packing import BITS, GROUP_SIZES, PACKED, Packing

LENGTHS = [1, 31, 32, 127, 128, 129, 300, 1000]


@dataclass(frozen=True)
class PackCase:
    """``case`` tells shapes and how pages lie; ``kind`` what the numbers are like; ``by_token`` how keys group."""

    case: Case
    bits: int = 2
    group: int = 32
    kind: str = "plain"
    by_token: bool = False

    @property
    def keys(self) -> int:
        """Keys that are packed: whole groups, where they are of tokens."""
        return self.case.n if self.by_token else -(-self.case.n // self.group) * self.group


@st.composite
def pack_cases(draw: Any) -> PackCase:
    return PackCase(
        replace(draw(cases(LENGTHS)), size=1.0),
        draw(st.sampled_from(BITS)),
        draw(st.sampled_from(GROUP_SIZES)),
        draw(st.sampled_from(["plain", "plain", "outliers", "constant", "tiny", "huge"])),
        draw(st.booleans()),
    )


class Packs:
    """Keys and values [lanes, n, d] of a case and their packed pools. Keys fill whole groups, so there may be more of
    them. Whatever of a pool holds no token is 255: NaN, where it is a scale."""

    def __init__(self, pack: PackCase) -> None:
        case = pack.case
        self.case, self.lanes = case, case.sequences * case.heads
        pages = -(-pack.keys // PACKED)
        self.layout = Paged(replace(case, n=pages * PAGE, d=16))
        self.table = self.layout.table()
        self.pages = max(first + count for lane in self.layout.runs for first, count in lane) + 1
        self.key_form = Packing(pack.bits, pack.group, case.d, case.dtype, True, pack.by_token)
        self.value_form = Packing(pack.bits, pack.group, case.d, case.dtype, are_keys=False)
        self.keys = self._numbers(pack.kind, pack.keys)
        self.values = self._numbers(pack.kind, case.n)

    def _numbers(self, kind: str, n: int) -> Tensor:
        x = self.layout.randn(self.lanes, n, self.case.d)
        if kind == "outliers":
            x[..., :: max(1, self.case.d // 5)] *= 100
        if kind == "constant":
            x[..., : self.case.d // 2] = 0.3
        most = float(torch.finfo(self.case.dtype).max)
        x = x * {"tiny": 1e-7, "huge": min(most / 8, 1e30)}.get(kind, 1.0)
        return x.clamp(-most, most).to(self.case.dtype)

    def pool(self, form: Packing) -> Tensor:
        return guarded(self.pages, form.page_bytes, dtype=torch.uint8).fill_(255)

    def slots(self, tokens: Sequence[int]) -> Tensor:
        """Pool slots [lanes, m]."""
        ids = [[first + i for first, count in lane for i in range(count)] for lane in self.layout.runs]
        return torch.tensor([[lane[t // PACKED] * PACKED + t % PACKED for t in tokens] for lane in ids]).view(
            self.lanes, len(tokens)
        )

    def law(self, form: Packing) -> Tensor:
        """The pool as the law writes it."""
        x = self.keys if form.are_keys else self.values
        pool = torch.full((self.pages, form.page_bytes), 255, dtype=torch.uint8)
        packing.pack(x.flatten(0, 1), pool, form, self.slots(range(x.shape[1])).flatten())
        return pool

    def parts(self, pool: Tensor, form: Packing, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and minima [sequences, heads, n, d]."""
        each = packing.codes_of(pool, form, self.slots(range(n)).flatten())
        shape = (self.case.sequences, self.case.heads, n, self.case.d)
        return tuple(part.view(shape) for part in each)  # type: ignore[return-value]

    def of_keys(self) -> tuple[Tensor, Packing, Lanes]:
        return self.law(self.key_form), self.key_form, self.table

    def of_values(self) -> tuple[Tensor, Packing, Lanes]:
        return self.law(self.value_form), self.value_form, self.table

    @property
    def rounds(self) -> bool:
        """Whether what is multiplied with codes is rounded to bfloat16."""
        wide = self.case.dtype != torch.bfloat16 or self.key_form.bits == 8
        return cpu.instruction_set() == "avx512_bf16" and not wide

    def logits(self, query: Tensor, tokens: range) -> tuple[Tensor, float]:
        """q.k [sequences, heads, r, n] in float64, with the rounding that the kernel promises, and what float32 sums
        may differ by."""
        codes, scale, least = (x.double() for x in self.parts(self.law(self.key_form), self.key_form, self.case.n))
        # By token, codes meet the query itself, which is a number of the model's dtype.
        rounds = self.rounds and not self.key_form.by_token
        zero = ((1 << self.key_form.bits) - 1) / 2 if rounds else 0.0
        groups = query.shape[1] // self.case.heads
        codes, scale, least = (
            x[:, :, tokens.start : tokens.stop].repeat_interleave(groups, 1)[:, :, None] for x in (codes, scale, least)
        )
        weights = query.double()[:, :, :, None] * scale
        if rounds:
            weights = weights.float().bfloat16().double()
        exact = query.double()[:, :, :, None] * (least + zero * scale)
        terms = weights * (codes - zero)
        slack = 4e-7 * float((terms.abs() + exact.abs()).sum(-1).amax()) if len(tokens) else 0.0
        return (terms + exact).sum(-1), slack


@guarding
def pack_writes_what_the_law_writes(pack: PackCase, cut: int, offset: int) -> list[Tensor]:
    """Codes, scales and minima are those of the law, whether tokens come at once or in two goes; nothing else moves."""
    packs = Packs(pack)
    pools = []
    for form, x in ((packs.key_form, packs.keys), (packs.value_form, packs.values)):
        at = cut % (x.shape[1] + 1)
        at = at // pack.group * pack.group if form.are_keys and not pack.by_token else at
        pool = packs.pool(form)
        strided = torch.full((*x.shape[:2], x.shape[2] + offset), float("nan"), dtype=x.dtype)[..., offset:].copy_(x)
        packed.pack(strided[:, :at], pool, form, packs.table, [0] * packs.lanes)
        packed.pack(strided[:, at:], pool, form, packs.table, [at] * packs.lanes)
        law = packs.law(form)
        for got, expected in zip(packs.parts(pool, form, x.shape[1]), packs.parts(law, form, x.shape[1]), strict=True):
            assert torch.equal(got, expected)
        free = torch.ones(packs.pages, dtype=torch.bool)
        free[packs.slots(range(x.shape[1])).flatten() // PACKED] = False
        assert bool((pool[free] == 255).all())
        assert intact(pool)
        pools.append(pool.clone())
    return pools


@guarding
def unpack_gives_what_the_law_gives(pack: PackCase, tokens: range | int) -> list[Tensor]:
    """A range, or ``tokens`` of them, a list of its own for each sequence."""
    packs, sequences = Packs(pack), pack.case.sequences
    index = tokens
    if isinstance(tokens, int):
        lists = [torch.randperm(pack.case.n, generator=packs.layout.random)[:tokens] for _ in range(sequences)]
        index = torch.stack(lists).sort(dim=-1).values
    m = index.shape[1] if isinstance(index, Tensor) else len(tokens)  # type: ignore[arg-type]
    answers = []
    for pool, form, table in (packs.of_keys(), packs.of_values()):
        whole = packing.unpack(pool, form, packs.slots(range(pack.case.n)).flatten()).view(packs.lanes, -1, pack.case.d)
        out = guarded(packs.lanes, m, pack.case.d, dtype=pack.case.dtype)
        packed.unpack(pool, form, table, index, sequences, out)  # type: ignore[arg-type]
        if isinstance(index, Tensor):
            rows = index.repeat_interleave(pack.case.heads, 0)
            expected = whole.gather(1, rows[..., None].expand(-1, -1, pack.case.d))
        else:
            expected = whole[:, index.start : index.stop]  # type: ignore[union-attr]
        # In float32 the compiler may fuse the product and the sum, which rounds once where the law rounds twice.
        rtol = 3e-7 if pack.case.dtype == torch.float32 else 0.0
        torch.testing.assert_close(out, expected, rtol=rtol, atol=rtol * float(whole.abs().amax()))
        assert intact(out)
        answers.append(out)
    return answers


@guarding
def scores_equal_the_law(pack: PackCase, tokens: range, rows: int) -> list[Tensor]:
    packs = Packs(pack)
    query = packs.layout.randn(pack.case.sequences, pack.case.heads * pack.case.groups, rows, pack.case.d)
    query = query.to(pack.case.dtype).float()
    got = packed.scores(query, packs.of_keys(), tokens)
    expected, slack = packs.logits(query, tokens)
    torch.testing.assert_close(got, expected.float(), rtol=0, atol=slack)
    return [got]


@guarding
def attend_equals_the_law(pack: PackCase, tokens: range, softcap: float | None) -> list[Tensor]:
    packs, case = Packs(pack), pack.case
    query = (2 * packs.layout.randn(case.sequences, case.heads * case.groups, case.d)).to(case.dtype).float()
    # Numbers of any size, so that weights are spread over tokens.
    scale = case.scale / max(1e-30, float(packs.keys.float().abs().median()))
    out, lse = packed.attend(query, packs.of_keys(), packs.of_values(), tokens, scale=scale, softcap=softcap)
    logits, slack = packs.logits(query[:, :, None], tokens)
    logits, slack = logits[:, :, 0] * scale, slack * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    codes, step, least = packs.parts(packs.law(packs.value_form), packs.value_form, case.n)
    value = (codes.double() * step.double() + least.double())[:, :, tokens.start : tokens.stop]
    value = value.repeat_interleave(case.groups, 1)
    expected = torch.einsum("bhn,bhnd->bhd", torch.softmax(logits, dim=-1), value)
    most = float(value.abs().amax()) if len(tokens) else 0.0
    atol = (2e-5 + 4 * slack) * most
    if packs.rounds:
        # Each weight times a scale is off by half a unit in the last of 8 places, and meets codes about zero.
        atol += 2**-8 * ((1 << pack.bits) - 1) / 2 * float(step.double().amax())
    torch.testing.assert_close(out, expected.float(), rtol=0, atol=atol)
    torch.testing.assert_close(lse, torch.logsumexp(logits, dim=-1).float(), rtol=1e-6, atol=2e-5 + 2 * slack)
    return [out, lse]


@guarding
def attend_with_recent_equals_both(pack: PackCase, tokens: range, recent: range, softcap: float | None) -> list[Tensor]:
    """Packed tokens and raw ones in one call, as in two calls whose answers are merged."""
    packs, raw = Packs(pack), Paged(replace(pack.case, n=recent.stop, size=1.0))
    query, held = raw.query(), (packs.of_keys(), packs.of_values())
    scale = pack.case.scale / max(1e-30, float(packs.keys.float().abs().median()))
    rule: dict[str, Any] = {"scale": scale, "softcap": softcap}
    behind = raw.keys, raw.values, raw.table(), recent
    out, lse = packed.attend(query, *held, tokens, recent=behind, **rule)
    alone = packed.attend(query, *held, tokens, **rule)
    other = cpu.decode(query, *behind, angles=None, interleaved=False, **rule)
    expected, total = reference.merge([alone, other])
    most = float(torch.cat([alone[0], other[0]]).abs().amax())
    # Weights are rounded to bfloat16 relative to the largest one of those that one thread has read.
    rounding = 2**-8 * float(raw.value.abs().amax()) if pack.case.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-5 * most + rounding)
    torch.testing.assert_close(lse, total, rtol=1e-6, atol=2e-5)
    return [out, lse]
