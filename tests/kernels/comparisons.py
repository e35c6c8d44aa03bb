"""What "equals the reference" means, once per compiled kernel.

Each comparison calls kernels through ``cpu``, raises AssertionError where they differ from the law, and returns what
they answered. Property tests feed them random shapes, ``test_cpu_faults`` proves that they can fail.
"""

from collections.abc import Sequence

import numpy as np
import torch
from paged import PAGE, Case, Paged, guarded, guarding, intact
from torch import Tensor

from kvote.kernels import cpu, law, reference

Limits = Sequence[int]


def close(got: Tensor, expected: Tensor, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def same_bits(got: Tensor, expected: Tensor) -> bool:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    return torch.equal(got.contiguous().view(kind), expected.contiguous().view(kind))


def rounding(dtype: torch.dtype) -> float:
    """What rounding to a dtype changes at most, relatively: half a unit in the last place."""
    return torch.finfo(dtype).eps / 2


# Sketches.


def decoded(sketch: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    """Codes about zero [pages, PAGE, d] and scales [pages, PAGE], by the layout that ``sketch.inl`` describes."""
    blocks = sketch.reshape(-1, cpu.sketch_bytes(dim, bits))
    rows = blocks[:, : cpu.SKETCH_TOKENS * dim * bits // 8].reshape(len(blocks), -1, 2, 16, 4)
    scales = blocks[:, -2 * cpu.SKETCH_TOKENS :].contiguous().view(torch.float16).float()
    if bits == 4:
        rows = torch.stack([rows & 15, rows >> 4], dim=2).flatten(1, 2)
    codes = rows.permute(0, 2, 3, 1, 4).reshape(-1, PAGE, dim).float() - (128.0 if bits == 8 else 7.5)
    return codes, scales.reshape(-1, PAGE)


def sketched(pool: Paged, bits: int) -> Tensor:
    """The keys [sequences, heads, n, d] that the sketches of a pool stand for."""
    assert pool.sketch is not None
    codes, scales = decoded(pool.sketch, pool.case.d, bits)
    apart = (codes * scales[..., None]).view(-1, pool.case.d)[pool.held].reshape(pool.key.shape)
    return apart + reference.centre(pool.key, PAGE)


@guarding
def sketch_stands_for_the_keys(case: Case, bits: int) -> list[Tensor]:
    """Every channel of a key less its lane's centre lies within half a step of its code; tokens that were not asked for
    keep their bytes."""
    pool = Paged(case)
    width = PAGE // cpu.SKETCH_TOKENS * cpu.sketch_bytes(case.d, bits)
    sketch = guarded(len(pool.keys), width, dtype=torch.uint8).fill_(85)
    start = case.seed % 2 * (case.n // 2)
    asked = pool.held[:, start:].flatten()
    cpu.sketch(pool.keys, sketch, bits, pool.table(), start, case.n)
    codes, scales = (x.flatten(0, 1) for x in decoded(sketch, case.d, bits))
    keys = pool.keys.view(-1, case.d).float()
    keys[asked] = (pool.key - reference.centre(pool.key, PAGE))[:, :, start:].reshape(-1, case.d)
    steps = 127.0 if bits == 8 else 7.5
    law = reference.sketched(keys[asked], bits)
    # A number midway between two codes may get either.
    same = (codes[asked] * scales[asked, None] - law).abs() <= 1e-6 * law.abs().amax(-1, keepdim=True)
    assert float((~same).float().mean()) <= 1e-3
    close(scales[asked], keys[asked].abs().amax(-1) / steps, rtol=2 * rounding(torch.float16))
    # The scale is rounded to half precision, so the largest code may lie a little off.
    off = (codes[asked] * scales[asked, None] - keys[asked]).abs() / scales[asked, None]
    assert float(off.max()) <= 0.5 + steps * 2 * rounding(torch.float16)
    others = torch.ones(len(keys), dtype=torch.bool)
    others[asked] = False
    codes, scales = (x.flatten(0, 1)[others] for x in decoded(torch.full_like(sketch, 85), case.d, bits))
    for was, now in zip((codes, scales), decoded(sketch, case.d, bits), strict=True):
        assert torch.equal(was, now.flatten(0, 1)[others])
    assert intact(sketch)
    return [sketch]


def whole(query: Tensor) -> Tensor:
    """Queries that a sketch meets without rounding: whole numbers up to 127 times a power of two."""
    step = torch.exp2((query.abs().amax(-1, keepdim=True) / 127).log2().ceil())
    codes = (query / step).round()
    codes[..., 0] = 127
    return codes * step


# Votes and the choice of the largest.


@guarding
def votes_equal_the_reference(case: Case, start: int, limits: Limits, bits: int = 0) -> list[Tensor]:
    """Soft votes of each sequence; those of a sketch equal the votes of what the sketch stands for."""
    pool = Paged(case, bits)
    query, key = case.scale * pool.query(len(limits)), pool.key
    if pool.sketch is not None:
        query, key = whole(query), sketched(pool, bits)
    got = [
        cpu.votes(query[i], pool.keys, pool.table(i), pool.sketch, bits, start, list(limits))
        for i in range(case.sequences)
    ]
    logits = reference.scores(query, key[:, :, start : max(limits)])
    expected = reference.soft_votes(reference.forbid(logits, start, list(limits)))
    # Weights of a sketch carry 10 bits. Weak tokens must keep their rank, so the range of float32 counts as well.
    rtol = (2e-3 if bits else 2e-5) + 4 * pool.slack(query, 1.0)
    close(torch.stack(got), expected, rtol=rtol, atol=1e-36 * case.heads * case.groups)
    heads = torch.full(expected.shape[:2], float(case.heads * case.groups))
    close(torch.stack(got).sum(-1), heads, rtol=2e-3 if bits else 2e-5)
    return got


def in_order(votes: Tensor, k: int) -> Tensor:
    """The k largest, ascending by place: NaN is the least of all, ties go to the lower index."""
    rows = votes.reshape(-1, votes.shape[-1]).numpy()
    missing = np.isnan(rows)
    order = np.lexsort((-np.where(missing, 0, rows), missing), axis=-1)[:, :k]
    return torch.from_numpy(np.sort(order, axis=-1)).reshape(*votes.shape[:-1], k)


@guarding
def top_k_finds_the_largest(votes: Tensor, k: int) -> list[Tensor]:
    got = cpu.top_k(votes, k)
    assert got.dtype == torch.int64
    assert torch.equal(got, in_order(votes, k))
    if not bool(votes.isnan().any()):
        by_reference = votes.gather(-1, reference.top_k(votes, k))
        assert torch.equal(votes.gather(-1, got).sort(-1).values, by_reference.sort(-1).values)
    return [got]


@guarding
def select_takes_the_winners_of_the_vote(case: Case, start: int, limits: Limits, k: int, bits: int = 0) -> list[Tensor]:
    """Winners are exactly those of ``cpu.votes``, which has a law of its own."""
    pool = Paged(case, bits)
    query = case.scale * pool.query(len(limits))
    got = []
    for i in range(case.sequences):
        given = query[i], pool.keys, pool.table(i), pool.sketch, bits, start, list(limits)
        got.append(cpu.select(*given, k))
        for row, votes, limit in zip(got[i], cpu.votes(*given), limits, strict=True):
            assert torch.equal(row, in_order(votes[: limit - start], k) + start)
    return got


@guarding
def select_rescores_what_was_nominated(
    case: Case, start: int, limits: Limits, k: int, nominate: int, bits: int
) -> list[Tensor]:
    """The nominated are exactly those of ``cpu.votes``; of them, none that wins has clearly fewer votes than one that
    does not. (The mass of tokens that were not nominated is known to the precision of a sketch's weights.)"""
    pool = Paged(case, bits)
    query = whole(case.scale * pool.query(len(limits)))
    m = min(max(nominate, k), min(limits) - start)
    rough = reference.scores(query, sketched(pool, bits)[:, :, start : max(limits)])
    exact = reference.scores(query, pool.key[:, :, start : max(limits)])
    got = []
    for i in range(case.sequences):
        given = query[i], pool.keys, pool.table(i), pool.sketch, bits, start, list(limits)
        got.append(cpu.select(*given, k, nominate))
        votes = cpu.votes(*given)
        for j, limit in enumerate(limits):
            nominated = in_order(votes[j, : limit - start], m)
            won = torch.isin(nominated, got[i][j] - start)
            assert int(won.sum()) == k
            assert bool((got[i][j].diff() > 0).all())
            law = reference.rescored(rough[i, j, :, : limit - start], exact[i, j][:, nominated], nominated)
            if case.size == 1 and not bool(won.all()):
                assert float(law[won].min()) >= float(law[~won].max()) * (1 - 1e-2)
    return got


# Attention.


@guarding
def decode_equals_the_reference(
    case: Case,
    tokens: range | int,
    *,
    pairs: int = 0,
    interleaved: bool = False,
    softcap: float | None = None,
    ends: list[int] | None = None,
) -> list[Tensor]:
    """One query position per sequence over a range, or over ``tokens`` of them, a list of its own for each; ``ends``:
    of the range, each lane as far as its own."""
    pool = Paged(case)
    query = pool.query()
    index = pool.some_tokens(tokens) if isinstance(tokens, int) else tokens
    m = tokens if isinstance(tokens, int) else len(tokens)
    angles = pool.angles(m, pairs=pairs) if pairs else None
    out, lse = cpu.decode(
        query,
        pool.keys,
        pool.values,
        pool.table(),
        index,
        angles=angles,
        interleaved=interleaved,
        scale=case.scale,
        softcap=softcap,
        ends=ends,
    )
    lists = index if isinstance(index, Tensor) else torch.tensor(index, dtype=torch.int64).expand(case.sequences, -1)
    places = lists[:, None, :, None].expand(-1, case.heads, -1, case.d)
    key, value = pool.key.gather(2, places), pool.value.gather(2, places)
    key = reference.rotate(key, *angles, interleaved=interleaved) if angles else key
    if ends is None:
        rule = {"scale": case.scale, "softcap": softcap}
        expected, total = reference.attend(query[:, :, None], key.float(), value.float(), **rule)
    else:
        given = query, pool.keys, pool.values, pool.table(), index
        rule = {"angles": angles, "interleaved": interleaved, "scale": case.scale, "softcap": softcap}
        expected, total = (x[:, :, None] for x in law.decode(*given, **rule, ends=ends))
    slack = 4 * pool.slack(query, case.scale)
    if angles and case.dtype != torch.float32:
        # A turned key may round to either neighbour.
        slack += 4 * rounding(case.dtype)
    close(lse, total[:, :, 0], rtol=1e-5, atol=1e-5 + slack)
    # One instruction set weighs bfloat16 values with bfloat16 weights.
    paired = case.dtype == torch.bfloat16 and cpu.instruction_set() == "avx512_bf16" and case.d % 64 == 0
    weight = rounding(torch.bfloat16) if paired else 0.0
    close(out, expected[:, :, 0], rtol=1e-5, atol=2e-5 + (slack + weight) * float(pool.value.abs().max()))
    return [out, lse]


@guarding
def mass_equals_the_reference(case: Case, start: int, limits: Limits, *, softcap: float | None = None) -> list[Tensor]:
    """What each token received from queries of which row i saw the tokens before ``limits[i]``."""
    pool = Paged(case)
    query = pool.query(len(limits))
    key = pool.key[:, :, start : max(limits)]
    mask = torch.arange(start, max(limits)) < torch.tensor(limits)[:, None]
    _, lse = reference.attend(query, key.float(), key.float(), scale=case.scale, mask=mask, softcap=softcap)
    got = cpu.attention_mass(
        query, lse, pool.keys, pool.table(), start, list(limits), scale=case.scale, softcap=softcap
    )
    expected = reference.attention_mass(query, lse, key, start, list(limits), scale=case.scale, softcap=softcap)
    slack = 8 * pool.slack(query, case.scale)
    close(got, expected, rtol=2e-5 + slack, atol=1e-36 * query.shape[1] * len(limits))
    rows = torch.full((case.sequences, case.heads), float(case.groups * len(limits)))
    close(got.sum(-1), rows, rtol=2e-5 + slack)
    return [got]


@guarding
def scores_equal_the_reference(case: Case, start: int, stop: int, rows: int = 2, labels: int = 0) -> list[Tensor]:
    """Of keys, or of so many channels of them, which lie apart with a page of each in a row."""
    pool = Paged(case)
    query, key = pool.query(rows), pool.key[:, :, start:stop]
    if labels:
        channels = torch.randperm(case.d, generator=pool.random)[:labels]
        apart = pool.keys[..., channels].transpose(1, 2).contiguous()
        got = cpu.label_scores(query[..., channels], apart, pool.table(), start, stop)
        query, key = query[..., channels], key[..., channels]
    else:
        got = cpu.scores(query, pool.keys, pool.table(), start, stop)
    close(got, reference.scores(query, key), rtol=2e-5, atol=pool.slack(query, 1.0))
    return [got]


# Rows that are turned, fetched and stored.


def turned_alike(got: Tensor, expected: Tensor, pairs: int, size: float) -> None:
    """Rotated channels equal but for one rounding, the others bit by bit."""
    close(got.float(), expected.float(), rtol=2 * rounding(got.dtype), atol=2e-6 * size)
    assert same_bits(got[..., 2 * pairs :], expected[..., 2 * pairs :])


@guarding
def turn_equals_the_reference(
    case: Case, pairs: int, *, interleaved: bool = False, shared: bool = False, strided: bool = False
) -> list[Tensor]:
    pool = Paged(case)
    x = pool.key.transpose(1, 2).contiguous().transpose(1, 2) if strided else pool.key
    cos, sin = pool.angles(1 if shared else case.sequences, case.n, pairs=pairs)
    got = cpu.rotate(x, (cos, sin), interleaved)
    turned_alike(got, reference.rotate(x, cos[:, None], sin[:, None], interleaved=interleaved), pairs, case.size)
    return [got]


@guarding
def gather_fetches_and_turns(case: Case, count: int, pairs: int = 0, interleaved: bool = False) -> list[Tensor]:
    pool = Paged(case)
    index, angles = pool.some_tokens(count), pool.angles(count, pairs=pairs)
    outs: list[Tensor] = []
    for i in range(case.sequences):
        out = tuple(guarded(case.heads, count, case.d, dtype=case.dtype) for _ in range(2))
        cpu.gather(pool.keys, pool.values, pool.table(i), index[i], angles, interleaved, (out[0], out[1]))
        key, value = pool.key[i][:, index[i]], pool.value[i][:, index[i]]
        turned_alike(out[0], reference.rotate(key, *angles, interleaved=interleaved), pairs, case.size)
        assert same_bits(out[1], value)
        assert all(intact(o) for o in out)
        outs += out
    return outs


@guarding
def append_stores_and_sketches(
    case: Case, count: int, *, bits: int = 0, value_dim: int = 32, strided: bool = False
) -> list[Tensor]:
    """Lanes of different lengths take ``count`` tokens each, and nothing else in the pools changes."""
    pool = Paged(case)
    lanes = case.sequences * case.heads
    first = [pool.below(case.n - count + 1) for _ in range(lanes)]
    shape = (case.sequences, case.heads, count)
    key = (case.size * pool.randn(*shape, case.d)).to(case.dtype)
    value = pool.randn(*shape, value_dim).to(case.dtype)
    if strided:
        key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))
    positions = torch.arange(case.sequences * (count + 3)).reshape(case.sequences, -1)[:, 2 : 2 + count]
    width = PAGE // cpu.SKETCH_TOKENS * cpu.sketch_bytes(case.d, bits or 8)
    pools = [
        guarded(len(pool.keys), PAGE, case.d, dtype=case.dtype),
        guarded(len(pool.keys), PAGE, value_dim, dtype=case.dtype),
        guarded(len(pool.keys), PAGE, dtype=torch.int32),
        guarded(len(pool.keys), width, dtype=torch.uint8),
    ]
    pools[0].view(-1, case.d)[pool.held.flatten()] = pool.key.reshape(-1, case.d)
    expected = [p.clone() for p in pools]
    slots = torch.cat([pool.slots(i, range(at, at + count)) for i, at in enumerate(first)])
    expected[0].view(-1, case.d)[slots] = key.reshape(-1, case.d)
    expected[1].view(-1, value_dim)[slots] = value.reshape(-1, value_dim)
    expected[2].view(-1)[slots] = positions[:, None].expand(-1, case.heads, -1).reshape(-1).int()
    for lane, at in enumerate(first) if bits and count else ():
        # What a page that was not full yet holds is sketched anew, about the centre that it now has.
        cpu.sketch(expected[0], expected[3], bits, pool.table().only(lane), 0 if at < PAGE else at, at + count)
    sketch = pools[3] if bits else None
    cpu.append(key, value, positions, (pools[0], pools[1], pools[2]), pool.table(), first, sketch, bits)
    for got, wanted in zip(pools, expected, strict=True):
        assert same_bits(got, wanted)
        assert intact(got)
    return pools
