"""xKV: the proofs of its card (arXiv 2503.18893)."""

from typing import Any

import pytest
import tiny
import torch
from selecting import DIM
from torch import Tensor

import kvote
from kvote import MethodError
from kvote.hf.facts import find_rope
from kvote.layer import Layer, LayerStack, Step
from kvote.spec import parse
from kvote.store import low_rank
from kvote.store.low_rank import LowRankBody, factors
from kvote.store.segment import Scaling
from kvote.tokens import Queries, TokenSet

N, HEADS, KV_HEADS = 90, 4, 2
WIDTH = KV_HEADS * DIM


class Stack:
    """Layers of one cache, fed with keys and queries whose un-rotated form the test knows."""

    def __init__(self, method: str, layers: int = 3, rows: int = 1, n: int = N + 20, rank: int | None = None) -> None:
        self.rope, stack = find_rope(tiny.model(), 0), LayerStack()
        self.layers = [Layer(i, parse(method), self.rope, layers, stack) for i in range(layers)]
        shape = (layers, rows, KV_HEADS, n, DIM)
        self.query, self.key, self.value = (
            torch.randn(layers, rows, HEADS, n, DIM),
            torch.randn(shape),
            torch.randn(shape),
        )
        if rank is not None:
            # Layers that share a subspace of tokens.
            tokens, mix = torch.randn(rows, n, rank), torch.randn(2, layers, rows, rank, WIDTH)
            made = (tokens @ mix).reshape(2, layers, rows, n, KV_HEADS, DIM).transpose(3, 4).contiguous()
            self.key, self.value = made
        self.at = 0

    def rotated(self, x: Tensor, start: int, stop: int) -> Tensor:
        cos, sin = self.rope.angles(torch.arange(start, stop)[None], torch.float32)
        return self.rope.apply(x[..., start:stop, :], (cos[:, None], sin[:, None]))

    def feed(self, count: int, prompt_left: int | None = 0) -> list[Tensor]:
        a, b = self.at, self.at + count
        self.at, decode = b, count == 1
        places = torch.arange(a, b).expand(self.query.shape[1], -1)
        return [
            layer.attend(
                Step(
                    self.rotated(query, a, b),
                    self.rotated(key, a, b),
                    value[:, :, a:b],
                    places,
                    valid=None,
                    tail_queries=int(decode),
                    scaling=Scaling(DIM**-0.5),
                    decode=decode,
                    prompt_left=None if decode else prompt_left,
                )
            )
            for layer, query, key, value in zip(self.layers, self.query, self.key, self.value, strict=True)
        ]

    def expected(self, number: int, count: int, key: Tensor, value: Tensor) -> Tensor:
        """What the last rows of a layer answer where it holds ``key`` and ``value`` [b, h, n, d] at position 0."""
        query, key = self.rotated(self.query[number], 0, self.at)[:, :, -count:], self.rotated(key, 0, self.at)
        key, value = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
        seen = torch.ones(count, self.at).tril(self.at - count).bool()
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        return out.transpose(1, 2)

    def body(self, number: int, row: int = 0) -> LowRankBody:
        body = self.layers[number].segment.bodies[row]
        assert isinstance(body, LowRankBody)
        return body


def side_by_side(x: Tensor, row: int, n: int) -> Tensor:
    """[layers, b, h, n, d] to the concatenation along channels [n, layers * h * d] of one sequence."""
    return x[:, row, :, :n].permute(2, 0, 1, 3).reshape(n, -1)


def best(matrix: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).float()


@pytest.mark.parametrize("n", [30, 64, 65, 5000])
@pytest.mark.parametrize("rank", [1, 7, 30])
def test_factors_are_the_best_approximation_of_their_rank(n, rank):
    parts = [torch.randn(n, 24), torch.randn(n, 40)]
    basis, blocks = factors(parts, rank)
    assert (basis.shape, [b.shape for b in blocks]) == ((n, rank), [(rank, 24), (rank, 40)])
    whole = torch.cat(parts, dim=1)
    lost = (whole - torch.cat([basis @ block for block in blocks], dim=1)).square().sum()
    discarded = torch.linalg.svdvals(whole.double())[rank:].square().sum()
    assert float(lost) == pytest.approx(float(discarded), rel=1e-4, abs=1e-2)
    sizes = torch.linalg.svdvals(whole.double())[:rank].float()
    torch.testing.assert_close(basis.norm(dim=0), sizes, rtol=1e-3, atol=1e-3)
    rows = torch.cat(blocks, dim=1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(rank), atol=2e-3, rtol=0)


@pytest.mark.parametrize("n", [40, 3000])
def test_a_full_rank_is_exact(n):
    parts = [torch.randn(n, 20), torch.randn(n, 20)]
    basis, blocks = factors(parts, min(n, 40))
    for part, block in zip(parts, blocks, strict=True):
        torch.testing.assert_close(basis @ block, part, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("bits", [torch.float32, torch.bfloat16])
def test_factors_are_the_same_every_time(bits):
    parts = [torch.randn(500, 64).to(bits) for _ in range(3)]
    one, other = factors(parts, 20), factors(parts, 20)
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("rows", [1, 2])
def test_the_prompt_is_exact_and_then_read_as_its_best_approximation(rows):
    stack = Stack("xkv(group=2, key_rank=9, value_rank=14)", layers=3, rows=rows)
    prompt = stack.feed(N)
    for number, got in enumerate(prompt):
        expected = stack.expected(number, N, stack.key[number, :, :, :N], stack.value[number, :, :, :N])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for count in (1, 13, 1):
        answers = stack.feed(count)
        for group in ([0, 1], [2]):
            held = []
            for made, rank in ((stack.key, 9), (stack.value, 14)):
                made = made[group, :, :, : stack.at].clone()
                for row in range(rows):
                    near = best(side_by_side(made, row, N), rank)
                    made[:, row, :, :N] = near.reshape(N, len(group), KV_HEADS, DIM).permute(1, 2, 0, 3)
                held.append(made)
            for i, number in enumerate(group):
                expected = stack.expected(number, count, held[0][i], held[1][i])
                torch.testing.assert_close(answers[number], expected, atol=1e-4, rtol=1e-4)


def test_basis_is_shared_by_the_layers_of_a_group_and_by_copies():
    stack = Stack("xkv(group=2, key_rank=5, value_rank=6)", layers=5, rows=2)
    stack.feed(N)
    bodies = [stack.body(number) for number in range(5)]
    assert bodies[0].basis is bodies[1].basis
    assert bodies[2].basis is bodies[3].basis is not bodies[0].basis
    assert len({id(body.basis) for body in bodies}) == 3
    assert [body.counts for body in bodies] == [True, False, True, False, True]
    for layer in stack.layers:
        layer.select([1, 1, 0, 1])
    assert stack.body(0, 0) is stack.body(0, 1) is stack.body(0, 3) is not stack.body(0, 2)


def test_no_group_is_encoded_before_its_last_layer_has_the_prompt():
    stack = Stack("xkv(group=2, key_rank=5, value_rank=6)", layers=4)
    seen = []
    encode = type(stack.layers[0].method.store).encode

    def spy(store: Any, layers: Any, row: int, n: int) -> Any:
        seen.append((len(layers), [layer.segment is not None and layer.segment.length(0) for layer in stack.layers], n))
        return encode(store, layers, row, n)

    object.__setattr__(stack.layers[0].method.store, "encode", spy.__get__(stack.layers[0].method.store))
    for layer in stack.layers[1:]:
        object.__setattr__(layer.method.store, "encode", spy.__get__(layer.method.store))
    stack.feed(50, prompt_left=N - 50)
    assert seen == []
    stack.feed(N - 50)
    stack.feed(1)
    assert seen == [(2, [N, N, 50, 50], N), (2, [N, N, N, N], N)]


def test_layers_that_share_a_token_subspace_are_exact_together_but_not_alone():
    for group, rank, exact in ((4, 8, True), (1, 2, False)):
        torch.manual_seed(0)
        stack = Stack(f"xkv(group={group}, key_rank={rank}, value_rank={rank})", layers=4, rank=8)
        stack.feed(N)
        for number, got in enumerate(stack.feed(1)):
            key, value = (x[number, :, :, : stack.at] for x in (stack.key, stack.value))
            assert stack.body(number).basis.key.shape == (N, rank)
            error = (got - stack.expected(number, 1, key, value)).abs().max()
            assert (float(error) < 2e-3) == exact


def test_keys_are_taken_before_their_rotation():
    """All tokens have one key: rank 1 at position 0, but not where they stand."""
    stack = Stack("xkv(group=3, key_rank=1, value_rank=1)", layers=3)
    stack.key[:] = torch.randn(3, 1, KV_HEADS, 1, DIM)
    stack.value[:] = torch.randn(3, 1, KV_HEADS, 1, DIM)
    stack.feed(N)
    for number, got in enumerate(stack.feed(1)):
        key, value = (x[number, :, :, : stack.at] for x in (stack.key, stack.value))
        torch.testing.assert_close(got, stack.expected(number, 1, key, value), atol=1e-4, rtol=1e-4)
        assert torch.linalg.matrix_rank(stack.rotated(key, 0, N)[0, 0]) > 2


def test_default_ranks_are_the_papers_shares_of_whatever_channels_a_group_has():
    stack = Stack("xkv", layers=6)
    stack.feed(N)
    for number, layers in ((0, 4), (4, 2)):
        basis = stack.body(number).basis
        assert basis.key.shape == (N, layers * WIDTH // 8)
        assert basis.value.shape == (N, layers * WIDTH * 3 // 16)


def test_stored_numbers_and_later_tokens():
    stack = Stack("xkv(group=3, key_rank=5, value_rank=0.25)", layers=3)
    stack.feed(N)
    stack.feed(1)
    stack.feed(17)
    numbers = sum(tensor.numel() for number in range(3) for tensor in stack.body(number).tensors)
    assert stack.body(0).basis.value.shape == (N, 24)
    assert numbers == N * 5 + 5 * 3 * WIDTH + N * 24 + 24 * 3 * WIDTH + N
    for number, layer in enumerate(stack.layers):
        key, value = layer.segment.decode([0], N, N + 18)
        torch.testing.assert_close(key, stack.key[number, :, :, N : N + 18], atol=1e-5, rtol=1e-5)
        assert torch.equal(value, stack.value[number, :, :, N : N + 18])
        assert layer.segment.encoded(0) == N


@pytest.mark.parametrize("length", [1, 12, 13])
def test_short_prompts_stay_whole_until_a_later_one_ends(length):
    stack = Stack("xkv(group=3, key_rank=12, value_rank=12)", layers=3)
    stack.feed(length)
    stack.feed(1)
    enough = length * 12 + 12 * 3 * WIDTH < length * 3 * WIDTH
    assert [layer.segment.bodies[0] is not None for layer in stack.layers] == [enough] * 3 == [length == 14] * 3
    stack.feed(70)
    assert [layer.segment.encoded(0) for layer in stack.layers] == [length + 71] * 3


def test_selecting_readers_score_the_basis_and_make_only_the_winners(monkeypatch):
    stack = Stack(
        "xkv(group=3, key_rank=7, value_rank=9) | tokenselect(top_k=6, sinks=2, window=4, chunk=8, tail=0, theta=2.0)",
        layers=3,
    )
    stack.feed(N)
    made = counted(monkeypatch)
    answers = stack.feed(1)
    assert len(made) == 3
    assert max(made) <= 2 + 6 + 4
    monkeypatch.undo()
    held = [layer.segment.decode([0], 0, N + 1) for layer in stack.layers]
    for number, (key, value) in enumerate(held):
        cos, sin = (a[0] for a in stack.rope.angles(torch.arange(20)[None], torch.float32))
        query = stack.query[number, :, :, N : N + 1]
        asked = stack.rope.apply(query, (cos[4:5], sin[4:5]))[0, :, 0]
        votes = sum(torch.softmax(key[0, head // 2, 2 : N - 4] @ asked[head], 0) for head in range(HEADS))
        list_ = [0, 1, *sorted((votes.topk(6).indices + 2).tolist()), *range(N - 4, N + 1)]
        keys = stack.rope.apply(key[:, :, list_], (cos[: len(list_)], sin[: len(list_)]))
        place = len(list_) - 1
        at = stack.rope.apply(query, (cos[place : place + 1], sin[place : place + 1]))
        keys, values = (x.repeat_interleave(2, 1) for x in (keys, value[:, :, list_]))
        expected = torch.nn.functional.scaled_dot_product_attention(at, keys, values).transpose(1, 2)
        torch.testing.assert_close(answers[number], expected, atol=1e-4, rtol=1e-4)


def test_scores_are_those_of_the_tokens_made():
    stack = Stack("xkv(group=3, key_rank=7, value_rank=9)", layers=3)
    stack.feed(N)
    stack.feed(1)
    segment, query = stack.layers[1].segment, torch.randn(1, HEADS, 3, DIM)
    key = segment.decode([0], 5, N + 1)[0].repeat_interleave(2, 1)
    expected = torch.einsum("bhrd,bhnd->brhn", query, key)
    torch.testing.assert_close(segment.scores(query, [0], 5, N + 1), expected, atol=1e-4, rtol=1e-4)


def test_query_heads_that_read_their_own_lists_read_the_tokens_made():
    stack = Stack("xkv(group=3, key_rank=7, value_rank=9)", layers=3)
    stack.feed(N)
    stack.feed(20)
    segment, query = stack.layers[1].segment, torch.randn(1, HEADS, 2, DIM)
    index = torch.rand(1, HEADS, 2, N + 20).argsort(-1)[..., :50].sort(-1).values
    key, value = segment.decode([0], 0, N + 20)
    key, value = (x.repeat_interleave(2, 1) for x in (stack.rotated(key, 0, N + 20), value))
    logits = query @ key.transpose(-1, -2) / DIM**0.5
    logits = logits.masked_fill(~torch.zeros(logits.shape, dtype=torch.bool).scatter(3, index, True), float("-inf"))
    out, lse = segment.attend(Queries(query), [0], TokenSet(index, causal=False), Scaling(DIM**-0.5))
    torch.testing.assert_close(out, logits.softmax(-1) @ value, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, logits.logsumexp(-1), atol=1e-4, rtol=1e-4)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens are made at a time, from now on."""
    made: list[int] = []
    product = low_rank._product

    def spy(basis: Tensor, slots: Any, block: Tensor) -> Tensor:
        made.append(len(slots))
        return product(basis, slots, block)

    monkeypatch.setattr(low_rank, "_product", spy)
    return made


@pytest.mark.parametrize("size", [16, 64])
def test_whole_keys_exist_for_some_tokens_at_a_time(monkeypatch, size):
    """The same answer however small the blocks, and never more tokens than a block."""
    one, other = (Stack("xkv(group=3, key_rank=7, value_rank=40)", layers=3) for _ in range(2))
    other.query, other.key, other.value = one.query, one.key, one.value
    for stack in (one, other):
        stack.feed(N)
    made = counted(monkeypatch)
    expected = [*one.feed(1), *one.feed(15)]
    assert set(made) == {N}
    monkeypatch.setattr(low_rank, "_BLOCK", size)
    made.clear()
    for got, want in zip([*other.feed(1), *other.feed(15)], expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert max(made) == size
    # For a single query no values are made, for 15 both.
    assert sum(made) == 3 * N + 2 * 3 * N


def test_sinks_and_a_window_drop_the_same_tokens_of_all_layers():
    net = tiny.model(num_hidden_layers=3)
    cache = tiny.cache(net, "streamingllm(sinks=2, window=60) | xkv(group=2, key_rank=6, value_rank=6)")
    tiny.feed(net, cache, tiny.ids(2, N))
    segments = [layer.segment for layer in cache.managed]
    assert [segment.encoded(0) for segment in segments] == [62] * 3
    tiny.feed(net, cache, tiny.ids(2, 9, seed=1), passes=1)
    assert [segment.encoded(1) for segment in segments] == [53] * 3
    assert segments[0].bodies[1].basis is segments[1].bodies[1].basis
    assert all(lane.tolist() == [0, 1, *range(N - 51, N + 9)] for lane in cache.positions(2)[0])


def test_a_crop_into_the_prompt_keeps_the_basis_shared_and_its_bytes_counted_once():
    net = tiny.model(num_hidden_layers=3)
    cache = tiny.cache(net, "xkv(group=2, key_rank=6, value_rank=6)")
    tiny.feed(net, cache, tiny.ids(2, N))
    before, held = cache.nbytes(), cache.managed[1].segment.decode([0, 1], 0, 50)
    cache.crop(-(N - 50))
    first, second, third = (layer.segment for layer in cache.managed)
    assert first.bodies[0].basis is second.bodies[0].basis is not third.bodies[0].basis
    assert first.nbytes > second.nbytes
    assert cache.nbytes() < before
    assert all(torch.equal(a, b) for a, b in zip(second.decode([0, 1], 0, 50), held, strict=True))
    tiny.feed(net, cache, tiny.ids(2, 5, seed=3))
    cache.crop(-55)
    assert second.bodies == [None, None]


@pytest.mark.parametrize("stay", [0, 2, 5])
def test_drafts_behind_an_announced_prompt_are_no_part_of_it(stay):
    net = tiny.model()
    cache = tiny.cache(net, "xkv(group=2, key_rank=6, value_rank=6)")
    cache.expect(N)
    cache.activate_past_recording()
    tiny.feed(net, cache, torch.cat([tiny.ids(1, N), tiny.ids(1, 5, seed=3)], dim=1))
    assert [layer.segment.encoded(0) for layer in cache.managed] == [0, 0]
    cache.crop(stay - 5)
    assert [layer.segment.encoded(0) for layer in cache.managed] == [N, N]
    assert [layer.segment.length(0) for layer in cache.managed] == [N + stay] * 2


@pytest.mark.parametrize("tokens", [32768])
def test_bytes_fall_as_the_formula_says(tokens):
    """Tokens times ranks plus ranks times channels, 4 bytes of position, once per group."""
    store, heads, dim, stack = parse("xkv(group=2, key_rank=32, value_rank=48)").store, 2, 64, []
    rope = find_rope(tiny.model(), 0)
    stack = [store.new_segment(heads, torch.empty(1, heads, 1, dim).bfloat16(), dim, rope) for _ in range(2)]
    for segment in stack:
        segment.add_sequences(1)
        made = torch.randn(1, heads, tokens, dim).bfloat16()
        segment.append([0], made, made, torch.arange(tokens)[None])
        segment.observe_queries(Queries(made, made), [0], 0)
    raw = sum(segment.nbytes for segment in stack)
    for index, segment in enumerate(stack):
        segment.compress(0)
        store.after_layer(stack, index, 0)
    formula = (32 + 48) * (tokens + 2 * heads * dim) * 2 + 4 * tokens
    held = sum(segment.nbytes for segment in stack)
    assert held == pytest.approx(formula, rel=0.02)
    assert held < raw / 6


def test_generation_with_padding_beams_and_samples_acts_row_by_row():
    net = tiny.model()
    tokens, mask = tiny.padded(2, 60, [9, 0])
    method = "xkv(group=2, key_rank=6, value_rank=6)"
    for way in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}):
        cache = tiny.cache(net, method)
        out = tiny.generate(net, tokens, cache, mask, **way)
        assert [cache.managed[1].segment.encoded(row) for row in range(6)] == [51] * 3 + [60] * 3
        for row, sequence in enumerate(out.sequences if "do_sample" in way else []):
            alone = tiny.cache(net, method)
            logits = [tiny.feed(net, alone, sequence[None, 9 if row < 3 else 0 : 60])[:, -1]]
            logits += [tiny.feed(net, alone, sequence[None, i : i + 1])[:, -1] for i in range(60, 67)]
            for mine, own in zip(logits, out.logits, strict=True):
                torch.testing.assert_close(mine[0], own[row], atol=1e-3, rtol=1e-3)


def test_hybrid_models_are_grouped_by_the_layers_managed():
    types = ["sliding_attention", "full_attention"] * 3
    net = tiny.model("gemma3", num_hidden_layers=6, layer_types=types)
    cache = tiny.cache(net, "xkv(group=2, key_rank=6, value_rank=6)")
    tiny.feed(net, cache, tiny.ids(1, 60))
    bodies = [layer.segment.bodies[0] for layer in cache.managed]
    assert [layer.index for layer in cache.managed] == [1, 3, 5]
    assert bodies[0].basis is bodies[1].basis is not bodies[2].basis


def test_a_document_is_asked_again_and_again_from_the_same_factors():
    from test_document import TEXT, Words

    document = kvote.Document(tiny.model(), Words(), TEXT, "xkv(group=2, key_rank=6, value_rank=6)", tokens_per_pass=32)
    body = document.cache.managed[0].segment.bodies[0]
    assert len(body.basis.positions) == len(document)
    one = document.ask("w1 w2 w3", max_new_tokens=6)
    document.ask("w30 w31", max_new_tokens=6)
    assert document.ask("w1 w2 w3", max_new_tokens=6).token_ids == one.token_ids
    assert document.cache.managed[0].segment.bodies[0] is body


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("xkv(group=0)", "group must be a whole number of layers"),
        ("xkv(group=True)", "group must be"),
        ("xkv(key_rank=0)", "key_rank must be a whole number of at least 1, or a share"),
        ("xkv(value_rank=1.5)", "value_rank must be"),
        ("xkv(value_rank=-0.5)", "value_rank must be"),
        ("xkv(key_rank='full')", "key_rank must be"),
        ("snapkv | xkv", "layers share what is stored of a token"),
        ("snapkv(per_head=False) | xkv", "layers share what is stored"),
        ("xkv | h2o", "layers share what is stored"),
        ("xkv | think", "both decide what to store"),
    ],
)
def test_what_makes_no_sense_is_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)
