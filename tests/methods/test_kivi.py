"""KIVI: which tokens are packed when, in how many bytes, and what of them is read."""

import copy
import itertools
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import kvote
from kvote import MethodError
from kvote.kernels import packing, reference
from kvote.rope import Rope
from kvote.store.codec import Codec
from kvote.store.quantised import QuantisedSegment
from kvote.store.segment import Scaling
from kvote.tokens import Queries, TokenSet

HEADS, DIM = 2, 32
SCALING = Scaling(DIM**-0.5)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def segment(
    bits: int = 2, group: int = 32, residual: int = 32, rope: Rope | None = None, **like: Any
) -> QuantisedSegment:
    made = QuantisedSegment(HEADS, torch.empty(0, DIM, **like), DIM, rope, codec=Codec(bits, group), residual=residual)
    made.add_sequences(1)
    return made


def feed(held: QuantisedSegment, keys: Tensor, values: Tensor, prompt: int = 0) -> None:
    """Tokens [h, n, d], the first ``prompt`` in one pass and the others one by one, sealed after each pass."""
    n, seen = keys.shape[1], held.length(0)
    cuts = [0, prompt, *range(prompt + 1, n + 1)] if prompt else range(n + 1)
    for start, stop in itertools.pairwise(cuts):
        at = torch.arange(seen + start, seen + stop)[None]
        held.append([0], keys[None, :, start:stop], values[None, :, start:stop], at)
        held.compress(0)


def expected(keys: Tensor, values: Tensor, bits: int, group: int, residual: int) -> tuple[Tensor, Tensor]:
    """What a segment of ``keys`` and ``values`` [h, n, d] stands for, by the rules of the paper."""
    n = keys.shape[1]
    packed_keys, packed_values = n // residual * residual, max(0, n - residual)
    keys, values = keys.clone(), values.clone()
    codes, scale, least = packing.quantise_keys(keys[:, :packed_keys], bits, group)
    each = (scale.repeat_interleave(group, 1), least.repeat_interleave(group, 1))
    keys[:, :packed_keys] = packing.dequantise(codes, *each)
    codes, scale, least = packing.quantise_values(values[:, :packed_values], bits, group)
    each = tuple(x.repeat_interleave(group, 2)[..., : values.shape[2]] for x in (scale, least))  # type: ignore[assignment]
    values[:, :packed_values] = packing.dequantise(codes, *each)
    return keys, values


@pytest.mark.parametrize(("bits", "group", "residual"), [(2, 32, 32), (4, 32, 96), (2, 64, 64), (2, 128, 128)])
@pytest.mark.parametrize(("prompt", "n"), [(0, 1), (0, 140), (31, 70), (32, 33), (128, 129), (200, 300), (257, 257)])
def test_keys_are_packed_in_whole_runs_and_values_one_by_one(bits, group, residual, prompt, n):
    keys, values = randn(HEADS, n, DIM), randn(HEADS, n, DIM, seed=1)
    held = segment(bits, group, residual)
    feed(held, keys, values, prompt)
    assert held.length(0) == n
    assert held.keys.length(0) == n // residual * residual
    assert held.values.length(0) == max(0, n - residual)
    for got, law in zip(held.decode([0], 0, n), expected(keys, values, bits, group, residual), strict=True):
        torch.testing.assert_close(got[0], law, rtol=3e-7, atol=1e-6)
    assert all(torch.equal(lane, torch.arange(n, dtype=torch.int32)) for lane in held.positions(0))
    # Raw pages that are packed are given back.
    assert held.uncompressed.length(0) < residual + 64 + (n < residual) * n


@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("tokens", [range(300), range(7, 300), range(100, 131), range(262, 300)])
def test_attention_is_that_of_what_is_held(rows, tokens):
    keys, values = randn(HEADS, 300, DIM), randn(HEADS, 300, DIM, seed=1)
    held = segment()
    feed(held, keys, values, 290)
    key, value = (x[:, :, tokens.start : tokens.stop] for x in held.decode([0], 0, 300))
    query = Queries(2 * randn(1, 3 * HEADS, rows, DIM, seed=2))
    own = tokens.stop == 300
    out, lse = held.attend(query, [0], TokenSet(tokens, causal=own), SCALING)
    mask = None
    if own:
        mask = torch.arange(len(tokens)) <= len(tokens) - rows + torch.arange(rows)[:, None]
    law, total = reference.attend(query.rotated, key, value, scale=SCALING.scale, mask=mask)
    torch.testing.assert_close(out, law, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(lse, total, atol=2e-5, rtol=2e-5)
    mass = held.attention_mass(query, lse, [0], TokenSet(tokens, causal=own), SCALING)
    torch.testing.assert_close(mass.sum(), torch.tensor(3.0 * HEADS * rows), rtol=1e-4, atol=0)
    scores = held.scores(query.rotated, [0], tokens.start, tokens.stop)
    torch.testing.assert_close(scores, reference.scores(query.rotated, key), atol=1e-4, rtol=1e-5)


def test_attention_within_a_window_and_over_lists():
    keys, values = randn(HEADS, 200, DIM), randn(HEADS, 200, DIM, seed=1)
    held = segment()
    feed(held, keys, values, 200)
    key, value = held.decode([0], 0, 200)
    query = Queries(2 * randn(1, 2 * HEADS, 5, DIM, seed=2))
    last = 195 + torch.arange(5)[:, None]
    mask = (torch.arange(200) <= last) & (torch.arange(200) > last - 60)
    law = reference.attend(query.rotated, key, value, scale=SCALING.scale, mask=mask)
    got = held.attend(query, [0], TokenSet(range(200), window=60), SCALING)
    for mine, other in zip(got, law, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)
    index = torch.stack([torch.randperm(200)[:50].sort().values for _ in range(5)])[None]
    out, _ = held.attend(query, [0], TokenSet(index, causal=False), SCALING)
    for j in range(5):
        some = (x[:, :, index[0, j]] for x in (key, value))
        law = reference.attend(query.rotated[:, :, j : j + 1], *some, scale=SCALING.scale)
        torch.testing.assert_close(out[:, :, j : j + 1], law[0], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("backend", ["reference", None])
def test_every_query_head_may_read_a_list_of_its_own(backend, monkeypatch):
    if backend:
        monkeypatch.setenv("KVOTE_BACKEND", backend)
    keys, values = randn(HEADS, 200, DIM), randn(HEADS, 200, DIM, seed=1)
    held = segment()
    feed(held, keys, values, 200)
    key, value = held.decode([0], 0, 200)
    query = Queries(2 * randn(1, 2 * HEADS, 3, DIM, seed=2))
    index = torch.stack([torch.randperm(200)[:50].sort().values for _ in range(2 * HEADS * 3)]).view(1, 4, 3, 50)
    out, lse = held.attend(query, [0], TokenSet(index, causal=False), SCALING)
    for head in range(2 * HEADS):
        for j in range(3):
            some = (x[:, head // 2, index[0, head, j]][:, None] for x in (key, value))
            law = reference.attend(query.rotated[:, head, j][:, None, None], *some, scale=SCALING.scale)
            torch.testing.assert_close(out[:, head, j], law[0][:, 0, 0], atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(lse[:, head, j], law[1][:, 0, 0], atol=2e-5, rtol=2e-5)
    mass = held.attention_mass(query, lse, [0], TokenSet(index, causal=False), SCALING)
    torch.testing.assert_close(mass.sum(-1), torch.ones(1, 2 * HEADS, 3), atol=1e-4, rtol=0)


def test_a_loud_channel_or_token_spoils_no_other():
    keys, values = randn(HEADS, 128, DIM), randn(HEADS, 128, DIM, seed=1)

    def errors(k: Tensor, v: Tensor) -> list[Tensor]:
        held = segment(residual=32)
        feed(held, k, v, 128)
        return [got[0] - given for got, given in zip(held.decode([0], 0, 128), (k, v), strict=True)]

    before = errors(keys, values)
    loud_keys, loud_values = keys.clone(), values.clone()
    loud_keys[:, :, 5] *= 100
    loud_values[:, 7] *= 100
    after = errors(loud_keys, loud_values)
    others = [i for i in range(DIM) if i != 5]
    assert torch.equal(before[0][..., others], after[0][..., others])
    others = [i for i in range(128) if i != 7]
    assert torch.equal(before[1][:, others], after[1][:, others])
    assert float(before[0].abs().max()) > 0.1


@pytest.mark.parametrize(("bits", "group", "expected_bits"), [(2, 32, 3.0), (2, 64, 2.5), (2, 128, 2.25), (4, 32, 5.0)])
def test_the_bytes_are_those_of_the_formula(bits, group, expected_bits):
    n, heads, dim, residual = 32_768, 8, 128, 128
    held = QuantisedSegment(
        heads, torch.empty(0, dim, dtype=torch.bfloat16), dim, None, codec=Codec(bits, group), residual=residual
    )
    held.add_sequences(1)
    x = randn(1, heads, n, dim).bfloat16()
    held.append([0], x, x, torch.arange(n)[None])
    raw = held.nbytes
    held.compress(0)
    body = expected_bits / 8 * dim * heads * (n + n - residual)
    paper = body + 2 * residual * dim * heads
    # Positions are 4 bytes a token, and keys are held as they are as long as their values.
    ours = paper + 2 * residual * dim * heads + 4 * (n - residual)
    assert ours < held.nbytes < 1.005 * ours
    assert expected_bits < 3 or held.nbytes < 1.02 * paper
    assert held.nbytes < raw / 3
    assert held.pools[1].owners.sum() == heads * n // packing.PACKED


@pytest.mark.parametrize("spec", ["kivi(residual=256)", "kivi(bits=4, group=64, residual=256)"])
def test_short_texts_are_dense_attention(spec):
    net = tiny.model()
    tokens = tiny.ids(2, 90)
    mine, dense = tiny.cache(net, spec), tiny.cache(net)
    for passes in (0, 7):
        assert torch.equal(tiny.feed(net, mine, tokens, passes=passes), tiny.feed(net, dense, tokens, passes=passes))


def test_a_prompt_reads_itself_as_it_is_even_in_several_announced_passes():
    net, tokens = tiny.model(), tiny.ids(2, 200)
    whole = tiny.feed(net, None, tokens)
    for announced in (False, True):
        cache = tiny.cache(net, "kivi(residual=32)")
        if announced:
            cache.expect(200)
        got = tiny.feed(net, cache, tokens, passes=50 if announced else 0)
        torch.testing.assert_close(got, whole, atol=1e-4, rtol=1e-4)
        assert cache.managed[0].segment.values.length(0) == 168
    later = tiny.ids(2, 20, seed=3)
    off = (tiny.feed(net, cache, later) - tiny.feed(net, None, torch.cat([tokens, later], 1))[:, -20:]).abs().max()
    assert float(off) > 0.05


def test_four_bits_err_less_than_two():
    net, tokens, later = tiny.model(), tiny.ids(1, 200), tiny.ids(1, 20, seed=3)
    whole = tiny.feed(net, None, torch.cat([tokens, later], dim=1))[:, -20:]

    def off(spec: str) -> float:
        cache = tiny.cache(net, spec)
        tiny.feed(net, cache, tokens)
        return float((tiny.feed(net, cache, later, passes=1) - whole).square().mean())

    assert off("kivi(bits=4, residual=32)") < off("kivi(residual=32)") / 4


@pytest.mark.parametrize("length", [0, 1, 31, 64, 100, 150, 168, 170, 191, 192, 199])
def test_a_crop_keeps_what_the_rest_decodes_to(length):
    keys, values = randn(HEADS, 200, DIM), randn(HEADS, 200, DIM, seed=1)
    held = segment()
    feed(held, keys, values, 200)
    before = [x.clone() for x in held.decode([0], 0, length)]
    held.truncate(0, length)
    held.trim()
    assert held.length(0) == length
    for mine, other in zip(held.decode([0], 0, length), before, strict=True):
        assert torch.equal(mine, other)
    assert held.values.length(0) <= held.keys.length(0) <= length
    feed(held, randn(HEADS, 100, DIM, seed=5), randn(HEADS, 100, DIM, seed=6), 50)
    n = length + 100
    assert held.keys.length(0) == n // 32 * 32
    assert held.values.length(0) == n - 32
    assert all(torch.equal(lane, torch.arange(n, dtype=torch.int32)) for lane in held.positions(0))
    # Codes of whole groups that were not cut are still the first ones.
    whole = length // 32 * 32
    assert torch.equal(held.decode([0], 0, whole)[0], before[0][:, :, :whole])


@pytest.mark.parametrize("per_head", [False, True])
def test_tokens_that_are_kept_are_packed_again(per_head):
    keys, values = randn(HEADS, 200, DIM), randn(HEADS, 200, DIM, seed=1)
    held = segment()
    feed(held, keys, values, 200)
    before = held.decode([0], 0, 200)
    random = torch.Generator().manual_seed(4)
    lists = [torch.randperm(200, generator=random)[:120].sort().values for _ in range(HEADS if per_head else 1)]
    slots = torch.stack(lists) if per_head else lists[0]
    held.keep(0, slots)
    rows = slots.expand(HEADS, -1)
    assert all(torch.equal(lane, row.int()) for lane, row in zip(held.positions(0), rows, strict=True))
    kept = [x[0].gather(1, rows[..., None].expand(-1, -1, DIM)) for x in before]
    for mine, other in zip(held.decode([0], 0, 120), kept, strict=True):
        assert torch.equal(mine[0], other)
    held.compress(0)
    assert (held.keys.length(0), held.values.length(0)) == (96, 88)
    assert all(torch.equal(lane, row.int()) for lane, row in zip(held.positions(0), rows, strict=True))
    for mine, law in zip(held.decode([0], 0, 120), expected(*kept, 2, 32, 32), strict=True):
        torch.testing.assert_close(mine[0], law, rtol=1e-6, atol=0.5)
        assert float((mine[0] - law).abs().mean()) < 0.05


def test_a_budget_of_bytes_is_kept():
    held = segment(dtype=torch.bfloat16)
    for nbytes in (50_000, 500_000):
        n = held.tokens_within(nbytes)
        again = segment(dtype=torch.bfloat16)
        x = randn(1, HEADS, n, DIM).bfloat16()
        again.append([0], x, x, torch.arange(n)[None])
        again.compress(0)
        assert again.nbytes <= nbytes
    assert again.nbytes > 400_000


def test_copies_share_pages_until_they_write():
    keys, values = randn(HEADS, 400, DIM), randn(HEADS, 400, DIM, seed=1)
    held = segment()
    feed(held, keys, values, 400)
    alone = held.nbytes
    held.select([0, 0, 0, 0])
    assert held.nbytes < 1.1 * alone
    before = held.decode([2], 0, 400)
    for row in range(4):
        held.append([row], randn(1, HEADS, 1, DIM, seed=row), randn(1, HEADS, 1, DIM), torch.tensor([[400]]))
    for step in range(40):
        more = randn(4, HEADS, 1, DIM, seed=50 + step)
        held.append([0, 1, 2, 3], more, more, torch.full((4, 1), 401 + step))
        held.compress(0)
    for mine, other in zip(held.decode([2], 0, 352), before, strict=True):
        assert torch.equal(mine, other[:, :, :352])
    assert held.nbytes < 3 * alone
    assert float((held.decode([0], 400, 401)[0] - held.decode([1], 400, 401)[0]).abs().max()) > 0.1


@pytest.mark.parametrize("backend", ["reference", None])
def test_the_law_alone_gives_the_same_tokens(backend, monkeypatch):
    if backend:
        monkeypatch.setenv("KVOTE_BACKEND", backend)
    net, tokens = tiny.model(), tiny.ids(2, 150)
    got = tiny.generate(net, tokens, tiny.cache(net, "kivi(residual=32)"), max_new_tokens=40)
    monkeypatch.delenv("KVOTE_BACKEND", raising=False)
    again = tiny.generate(net, tokens, tiny.cache(net, "kivi(residual=32)"), max_new_tokens=40)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(again.logits), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prefill_chunk_size": 32},
    ],
    ids=str,
)
def test_generate_in_its_ways(settings):
    net = tiny.model()
    tokens, mask = tiny.padded(2, 120, [0, 50])
    cache = tiny.cache(net, "kivi(residual=32)")
    torch.manual_seed(0)
    out = tiny.generate(net, tokens, cache, mask, max_new_tokens=45, **settings)
    assert out.sequences.shape[1] == 165
    assert cache.managed[0].segment.values.length(0) == 164 - 32
    # With room for all, the same calls are those of dense attention.
    torch.manual_seed(0)
    mine = tiny.generate(net, tokens, tiny.cache(net, "kivi(residual=512)"), mask, max_new_tokens=45, **settings)
    torch.manual_seed(0)
    dense = tiny.generate(net, tokens, tiny.cache(net), mask, max_new_tokens=45, **settings)
    assert torch.equal(mine.sequences, dense.sequences)


def test_turns_and_copies_go_on_from_the_codes():
    net, cache = tiny.model(), tiny.cache(tiny.model(), "kivi(residual=32)")
    tokens = tiny.ids(1, 150)
    first = tiny.generate(net, tokens, cache, max_new_tokens=20).sequences
    clone = copy.deepcopy(cache)
    turn = torch.cat([first, tiny.ids(1, 30, seed=8)], dim=1)
    one = tiny.generate(net, turn, cache, max_new_tokens=20)
    two = tiny.generate(net, turn, clone, max_new_tokens=20)
    assert torch.equal(one.sequences, two.sequences)
    assert cache.get_seq_length() == clone.get_seq_length() == 219


def test_rotated_by_a_reader_keys_are_packed_without_rotation():
    net = tiny.model()
    cache = tiny.cache(net, "kivi(bits=4, residual=32) | tokenselect(top_k=20, sinks=2, window=6, chunk=8)")
    tokens = tiny.ids(1, 200)
    tiny.feed(net, cache, tokens)
    plain = tiny.cache(net, "tokenselect(top_k=20, sinks=2, window=6, chunk=8)")
    tiny.feed(net, plain, tokens)
    mine, other = (each.managed[0].segment for each in (cache, plain))
    off = (mine.decode([0], 0, 200)[0] - other.decode([0], 0, 200)[0]).abs()
    assert 0 < float(off[:, :, :160].max()) < float(other.decode([0], 0, 200)[0].abs().max()) / 8
    assert float(off[:, :, 192:].max()) == 0


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("kivi(bits=3)", "bits must be 2 or 4; got 3"),
        ("kivi(group=16)", "group must be 32, 64 or 128; got 16"),
        ("kivi(residual=100)", "residual must be a multiple of the group of 32 tokens; got 100"),
        ("kivi(residual=0)", "multiple of the group"),
        ("kivi(residual='all')", "multiple of the group|wrong type"),
        ("kivi() | kivi(bits=4)", "both decide what to store"),
        ("kivi() | h2o(budget=64)", "decoded and encoded again"),
    ],
)
def test_what_makes_no_sense_is_refused(spec, reason):
    with pytest.raises(MethodError, match=reason):
        kvote.Cache(tiny.model(), spec)


def test_heads_that_hold_different_tokens_keep_their_own_positions():
    """Also when raw pages are given back, and after a crop into the body; copies know it, too."""
    keys, values = randn(HEADS, 300, DIM), randn(HEADS, 300, DIM, seed=1)
    held = segment()
    feed(held, keys[:, :200], values[:, :200], prompt=200)
    assert len(held.packed.positions(0)) == 1
    slots = torch.stack([torch.arange(200) + (head and 5) for head in range(HEADS)])[:, :150]
    held.keep(0, slots)
    held.compress(0)
    feed(held, keys[:, 200:], values[:, 200:])
    held.select([0, 0])
    held.truncate(1, 70)
    for row, n in ((0, 250), (1, 70)):
        for head, lane in enumerate(held.positions(row)):
            assert torch.equal(lane[:70], slots[head, :70].int())
            assert len(lane) == n
