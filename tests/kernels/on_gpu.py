"""Comparisons of the GPU kernels with the law, on whatever runs them here: a GPU, or Triton's interpreter."""

from dataclasses import replace
from typing import Any

import packs
import pytest
import torch
from paged import PAGE, Case, Paged
from torch import Tensor

from kvote.kernels import gpu, packing, reference

DEVICE = torch.device("cpu" if gpu.interpreted() else "cuda")
runs = pytest.mark.skipif(gpu.why_not() is not None, reason=str(gpu.why_not()))


def kernels() -> Any:
    from kvote.kernels import triton

    return triton


class There(Paged):
    """``Paged`` on the device. The law reads what lies on the CPU (``key``, ``value``)."""

    def __init__(self, case: Case, bits: int = 0) -> None:
        super().__init__(case)
        self.keys, self.values = self.keys.to(DEVICE), self.values.to(DEVICE)
        if bits:
            width = PAGE // kernels().SKETCH_TOKENS * kernels().sketch_bytes(case.d, bits)
            self.sketch = torch.full((len(self.keys), width), 255, dtype=torch.uint8, device=DEVICE)
            kernels().sketch(self.keys, self.sketch, bits, self.table(), 0, case.n)


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the largest number there is in the answer; nothing is NaN where the law is not."""
    assert got.shape == expected.shape
    size = expected[expected.isfinite()].abs().max().item() if bool(expected.isfinite().any()) else 1.0
    torch.testing.assert_close(got.cpu().float(), expected.float(), rtol=0, atol=tolerance * max(size, 1e-30))


def decode_equals_the_law(
    case: Case,
    tokens: range | int,
    *,
    pairs: int = 0,
    interleaved: bool = False,
    softcap: float | None = None,
    stops: list[int] | None = None,
    ends: list[int] | None = None,
) -> None:
    pool = There(case)
    query = pool.query()
    index = pool.some_tokens(tokens) if isinstance(tokens, int) else tokens
    m = tokens if isinstance(tokens, int) else len(tokens)
    angles = pool.angles(m, pairs=pairs) if pairs else None
    out, lse = kernels().decode(
        query.to(DEVICE),
        pool.keys,
        pool.values,
        pool.table(),
        index.to(DEVICE) if isinstance(index, Tensor) else index,
        angles=None if angles is None else tuple(a.to(DEVICE) for a in angles),
        interleaved=interleaved,
        scale=case.scale,
        softcap=softcap,
        ends=ends,
        stops=None if stops is None else torch.tensor(stops, dtype=torch.int32, device=DEVICE),
    )
    assert out.dtype == lse.dtype == torch.float32
    lists = index if isinstance(index, Tensor) else torch.tensor(index).expand(case.sequences, -1)
    places = lists[:, None, :, None].expand(-1, case.heads, -1, case.d)
    key, value = pool.key.gather(2, places), pool.value.gather(2, places)
    key = reference.rotate(key, *angles, interleaved=interleaved) if angles else key
    if ends is not None:
        key, value = key.flatten(0, 1)[:, None], value.flatten(0, 1)[:, None]
        query, out, lse = (x.reshape(len(ends), case.groups, *x.shape[2:]) for x in (query, out, lse))
        stops = ends
    for i in range(len(key)):
        seen = slice(None) if stops is None else slice(0, stops[i] - (index.start if isinstance(index, range) else 0))
        mine = (x[i : i + 1, :, seen].float() for x in (key, value))
        expected, total = reference.attend(query[i : i + 1, :, None], *mine, scale=case.scale, softcap=softcap)
        # Weights meet the values in the dtype of the pools, and turned keys are rounded to it.
        close(out[i], expected[0, :, 0], 1e-5 + 2 * rounding(case.dtype))
        close(lse[i], total[0, :, 0], 1e-5 + (2 * rounding(case.dtype) if angles else 0))


def cut(dtype: torch.dtype) -> float:
    """What the interpreter's conversion to bfloat16, which cuts off instead of rounding, adds to an error."""
    return rounding(dtype) if gpu.interpreted() and dtype == torch.bfloat16 else 0.0


class PacksThere(packs.Packs):
    """``Packs`` on the device, written by the law."""

    def there(self) -> tuple[Any, Any]:
        """Pools, forms and lanes of keys and of values, as the kernels take them."""
        keys, values = self.of_keys(), self.of_values()
        return (keys[0].to(DEVICE), *keys[1:]), (values[0].to(DEVICE), *values[1:])

    def decoded(self, form: packing.Packing) -> Tensor:
        """Keys or values [sequences, heads, n, d] as the law decodes them."""
        pool, case = self.law(form), self.case
        return packing.unpack(pool, form, self.slots(range(case.n)).flatten()).view(
            case.sequences, case.heads, case.n, case.d
        )


def packed_attend_equals_the_law(
    pack: packs.PackCase,
    tokens: range,
    *,
    softcap: float | None = None,
    stops: list[int] | None = None,
    recent: range | None = None,
) -> None:
    """Attention over packed tokens, and over raw ``recent`` ones, equals that over what the law decodes."""
    held, case = PacksThere(pack), pack.case
    raw = There(replace(case, n=recent.stop)) if recent else None
    query = held.layout.randn(case.sequences, case.heads * case.groups, case.d).to(case.dtype).float()
    keys, values = held.there()
    # Numbers of any size, so that weights are spread over tokens.
    scale = case.scale / max(1e-30, float(held.keys.float().abs().median()))
    out, lse = kernels().packed.attend(
        query.to(DEVICE),
        keys,
        values,
        tokens,
        recent=None if raw is None else (raw.keys, raw.values, raw.table(), recent),
        scale=scale,
        softcap=softcap,
        stops=None if stops is None else torch.tensor(stops, dtype=torch.int32, device=DEVICE),
    )
    assert out.dtype == lse.dtype == torch.float32
    key, value = held.decoded(held.key_form), held.decoded(held.value_form)
    for i in range(case.sequences):
        seen = slice(tokens.start, tokens.stop if stops is None else max(tokens.start, min(tokens.stop, stops[i])))
        mine = [x[i : i + 1, :, seen].float() for x in (key, value)]
        if raw is not None and recent is not None:
            others = (x[i : i + 1, :, recent.start : recent.stop].float() for x in (raw.key, raw.value))
            mine = [torch.cat(pair, dim=2) for pair in zip(mine, others, strict=True)]
        expected, total = reference.attend(query[i : i + 1, :, None], *mine, scale=scale, softcap=softcap)
        # Weights meet the values in the model's dtype.
        close(out[i], expected[0, :, 0], 1e-5 + 2 * rounding(case.dtype))
        close(lse[i], total[0, :, 0], 1e-5 + cut(case.dtype))


def packed_scores_equal_the_law(pack: packs.PackCase, tokens: range, rows: int) -> None:
    held, case = PacksThere(pack), pack.case
    query = held.layout.randn(case.sequences, case.heads * case.groups, rows, case.d)
    got = kernels().packed.scores(query.to(DEVICE), held.there()[0], tokens)
    assert got.dtype == torch.float32
    key = held.decoded(held.key_form)[:, :, tokens.start : tokens.stop]
    close(got, reference.scores(query, key).transpose(1, 2), 2.0**-14 + cut(case.dtype))


def pack_writes_what_the_law_writes(
    pack: packs.PackCase, firsts: list[int], count: int, *, offset: int = 0, spoil: float | None = None
) -> None:
    """Pages are those of the law in every byte, whatever lay in them, after ``count`` tokens have gone behind
    ``firsts[lane]`` others; whole groups, where they are of tokens. With ``offset``, tokens have gaps between them;
    ``spoil`` is one number of each lane, and then NaN is like NaN."""
    held = PacksThere(pack)
    for form, tokens in ((held.key_form, held.keys), (held.value_form, held.values)):
        group = form.group_size if form.are_keys and not form.by_token else 1
        x, begin = tokens[:, : count // group * group].clone(), [at // group * group for at in firsts]
        if spoil is not None:
            x[:, :1, pack.case.d // 2] = spoil
        lying = torch.randint(256, (held.pages, form.page_bytes), dtype=torch.uint8, generator=held.layout.random)
        slots = torch.cat([held.slots(range(at, at + x.shape[1]))[lane] for lane, at in enumerate(begin)])
        law, mine = lying.clone(), lying.to(DEVICE)
        packing.pack(x.flatten(0, 1), law, form, slots)
        wide = torch.full((*x.shape[:2], pack.case.d + offset), float("nan"), dtype=x.dtype, device=DEVICE)
        strided = wide[..., offset:].copy_(x.to(DEVICE))
        kernels().packed.pack(strided, mine, form, held.table, begin)
        if spoil is None:
            assert torch.equal(mine.cpu(), law)
            continue
        for got, expected in zip(*(packing.codes_of(pool, form, slots) for pool in (mine.cpu(), law)), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def unpack_gives_what_the_law_gives(pack: packs.PackCase, tokens: range | int) -> None:
    """A range, or ``tokens`` of them, a list of its own for each sequence."""
    held, case = PacksThere(pack), pack.case
    index = tokens
    if isinstance(tokens, int):
        lists = [torch.randperm(case.n, generator=held.layout.random)[:tokens] for _ in range(case.sequences)]
        index = torch.stack(lists)
    rows = index if isinstance(index, Tensor) else torch.tensor(index).expand(case.sequences, -1)
    places = rows[:, None, :, None].expand(-1, case.heads, -1, case.d)
    for pool, form, table in held.there():
        # Room for one more token, which stays as it is.
        out = torch.full((held.lanes, rows.shape[1] + 1, case.d), 7.0, dtype=case.dtype, device=DEVICE)
        there = index.to(DEVICE) if isinstance(index, Tensor) else index
        kernels().packed.unpack(pool, form, table, there, case.sequences, out)
        assert torch.equal(out[:, :-1].cpu().view(places.shape), held.decoded(form).gather(2, places))
        assert bool((out[:, -1] == 7.0).all())


def label_scores_equal_the_law(case: Case, start: int, stop: int, rows: int, labels: int) -> None:
    """Of so many channels of the keys, which lie apart with a page of each in a row."""
    pool = There(case)
    channels = torch.randperm(case.d, generator=pool.random)[:labels]
    apart = pool.keys[..., channels.to(DEVICE)].transpose(1, 2).contiguous()
    query = pool.randn(case.sequences, case.heads * case.groups, rows, labels)
    got = kernels().label_scores(query.to(DEVICE), apart, pool.table(), start, stop)
    assert got.dtype == torch.float32
    close(got, reference.scores(query, pool.key[:, :, start:stop, channels]), 2.0**-14)


def votes_equal_the_law(case: Case, start: int, limits: list[int], k: int, bits: int = 0) -> None:
    """Votes, and winners among them; with a sketch, those that it nominates are scored again."""
    pool = There(case, bits)
    query = 2 * case.scale * pool.randn(case.sequences, case.heads * case.groups, len(limits), case.d)
    given = query.to(DEVICE), pool.keys, pool.table(), pool.sketch, bits, start, limits
    centre = reference.centre(pool.key, PAGE)
    key = centre + reference.sketched(pool.key - centre, bits) if bits else pool.key
    rough = reference.forbid(reference.scores(query, key[:, :, start : max(limits)]), start, limits)
    law = reference.soft_votes(rough)
    if not bits:
        scored = kernels().scores(query.to(DEVICE), pool.keys, pool.table(), start, max(limits))
        close(scored, reference.scores(query, key[:, :, start : max(limits)]), 2.0**-14)
    votes = kernels().votes(*given)
    assert votes.dtype == torch.float32
    # Queries meet 16-bit keys in two parts, which together hold 16 bits or more of them; codes meet bfloat16 parts.
    tolerance = 5e-4 if bits or case.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(votes.cpu(), law, rtol=tolerance, atol=1e-7)
    won = kernels().select(*given, k)
    winners_hold_the_most(won.cpu() - start, reference.forbid(law, start, limits), k, tolerance)
    one = kernels().votes(query[0].to(DEVICE), pool.keys, pool.table(0), pool.sketch, bits, start, limits)
    torch.testing.assert_close(one.cpu(), law[0], rtol=tolerance, atol=1e-7)
    if bits:
        nominate = min(4 * k, min(limits) - start)
        won = kernels().select(*given, k, nominate)
        nominated = reference.forbid(law, start, limits).topk(nominate).indices
        exact = reference.scores(query, pool.key[:, :, start : max(limits)])
        exact = exact.gather(-1, nominated[:, :, None].expand(*exact.shape[:3], -1))
        final = torch.full_like(law, float("-inf")).scatter(-1, nominated, reference.rescored(rough, exact, nominated))
        winners_hold_the_most(won.cpu() - start, final, k, tolerance)


def winners_hold_the_most(won: Tensor, votes: Tensor, k: int, tolerance: float) -> None:
    """``won`` [.., k] is ascending, and no other token has clearly more votes than one of them."""
    assert won.dtype == torch.int64
    assert won.shape == (*votes.shape[:-1], k)
    assert bool((won.diff() > 0).all())
    least = votes.topk(k).values[..., -1:]
    assert bool((votes.gather(-1, won) >= least * (1 - 2 * tolerance)).all())


def sketch_is_that_of_the_law(case: Case, bits: int) -> None:
    pool = There(case, bits)
    assert pool.sketch is not None
    width = case.d * bits // 8
    raw = pool.sketch.cpu()
    codes = raw[:, : PAGE * width].reshape(-1, PAGE, width)
    scales = raw[:, PAGE * width :].contiguous().view(torch.float16).float()
    held = codes.view(torch.int8).float()
    if bits == 4:
        held = torch.cat([codes & 15, codes >> 4], dim=-1).float() - 7.5
    held = (held * scales[..., None]).view(-1, case.d)[pool.held].reshape(pool.key.shape)
    apart = pool.key.float() - reference.centre(pool.key, PAGE)
    law = reference.sketched(apart, bits)
    # A number next to the middle between two codes may get either.
    wrong = (held - law).abs() > 1e-6 * law.abs().amax(-1, keepdim=True)
    assert float(wrong.float().mean()) <= 1e-3
    assert float((held - apart).abs().max()) <= float(apart.abs().max()) / (127 if bits == 8 else 7)


def attend_equals_the_law(
    case: Case, t: int, *, causal: bool = True, window: int | None = None, softcap: float | None = None
) -> None:
    """A chunk of ``t`` queries at the end of ``n`` tokens; keys lie as [b, n, h, d]."""
    random = torch.Generator().manual_seed(case.seed)
    heads = case.heads * case.groups
    query = torch.randn(case.sequences, heads, t, case.d, generator=random).to(case.dtype)
    key, value = (
        torch.randn(case.sequences, case.n, case.heads, case.d, generator=random).to(case.dtype).transpose(1, 2)
        for _ in range(2)
    )
    out, lse = kernels().attend(
        *(x.to(DEVICE) for x in (query, key, value)), scale=case.scale, causal=causal, window=window, softcap=softcap
    )
    assert out.dtype == case.dtype
    row, column = torch.arange(t)[:, None] + case.n - t, torch.arange(case.n)
    mask = (column <= row) & (column > row - (window or case.n + t)) if causal else None
    law = reference.attend(query.float(), key.float(), value.float(), scale=case.scale, mask=mask, softcap=softcap)
    close(out, law[0], 1e-5 + 2 * rounding(case.dtype))
    close(lse, law[1], 1e-5)


def mass_equals_the_law(case: Case, start: int, limits: list[int], softcap: float | None = None) -> None:
    pool = There(case)
    query = pool.query(len(limits))
    key = pool.key[:, :, start : max(limits)].float()
    mask = torch.arange(start, max(limits)) < torch.tensor(limits)[:, None]
    _, lse = reference.attend(query, key, key, scale=case.scale, mask=mask, softcap=softcap)
    lse[:, 0, 0] = float("-inf")
    got = kernels().attention_mass(
        query.to(DEVICE), lse.to(DEVICE), pool.keys, pool.table(), start, limits, scale=case.scale, softcap=softcap
    )
    close(got, reference.attention_mass(query, lse, key, start, limits, scale=case.scale, softcap=softcap), 2e-5)


def gather_fetches_and_turns(case: Case, count: int, pairs: int, interleaved: bool, lists: int = 1) -> None:
    pool = There(case)
    index = torch.stack([pool.some_tokens(count) for _ in range(lists)], dim=1)
    angles = pool.angles(count, pairs=pairs)
    shape = (case.sequences, lists, case.heads, count, case.d)
    outs = [torch.full(shape, float("nan"), dtype=case.dtype, device=DEVICE) for _ in range(2)]
    there = tuple(a.to(DEVICE) for a in angles)
    kernels().gather(pool.keys, pool.values, pool.table(), index.to(DEVICE), there, interleaved, tuple(outs))
    places = index[:, :, None, :, None].expand(shape)
    key, value = (x[:, None].expand(-1, lists, -1, -1, -1).gather(3, places) for x in (pool.key, pool.value))
    close(outs[0], reference.rotate(key, *angles, interleaved=interleaved), 2 * rounding(case.dtype))
    assert torch.equal(outs[1].cpu(), value)
    x = pool.key.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :count]
    got = kernels().rotate(x.to(DEVICE), tuple(a[None] for a in there), interleaved)
    close(got, reference.rotate(x, *angles, interleaved=interleaved), 2 * rounding(case.dtype))


def append_stores_and_sketches(case: Case, count: int, first: list[int], bits: int, value_dim: int) -> None:
    """Lanes take ``count`` tokens each; nothing else in the pools changes."""
    pool = There(case)
    shape = (case.sequences, count, case.heads)
    key, value = (pool.randn(*shape, size).to(case.dtype).transpose(1, 2) for size in (case.d, value_dim))
    positions = torch.arange(case.sequences * (count + 3)).reshape(case.sequences, -1)[:, 2 : 2 + count]
    pages, width = len(pool.keys), kernels().sketch_bytes(case.d, bits or 8)
    pools = [
        torch.full((pages, PAGE, case.d), 7.0, dtype=case.dtype),
        torch.full((pages, PAGE, value_dim), 7.0, dtype=case.dtype),
        torch.full((pages, PAGE), 7, dtype=torch.int32),
        torch.full((pages, width), 85, dtype=torch.uint8),
    ]
    given = [p.to(DEVICE).clone() for p in pools]
    slots = torch.cat([pool.slots(i, range(at, at + count)) for i, at in enumerate(first)])
    pools[0].view(-1, case.d)[slots] = key.reshape(-1, case.d)
    pools[1].view(-1, value_dim)[slots] = value.reshape(-1, value_dim)
    pools[2].view(-1)[slots] = positions[:, None].expand(-1, case.heads, -1).reshape(-1).int()
    there = pools[3].to(DEVICE)
    for lane, at in enumerate(first) if bits else ():
        where = pool.table().only(lane)
        kernels().sketch(pools[0].to(DEVICE), there, bits, where, 0 if at < PAGE else at, at + count)
    pools[3] = there.cpu()
    sketch = given[3] if bits else None
    new = (x.to(DEVICE) for x in (key, value, positions))
    kernels().append(*new, tuple(given[:3]), pool.table(), first, sketch, bits)
    for got, wanted in zip(given, pools, strict=True):
        assert torch.equal(got.cpu(), wanted)
