"""MiniCache: the proofs of its card (arXiv 2405.14366)."""

import math

import pytest
import tiny
import torch
from torch import Tensor

import kvote
from kvote import MethodError
from kvote.spec import parse
from kvote.store.merged import MergedBody
from kvote.store.pair import Side, apart, merged, slerp

H, N, D = 2, 40, 16


def rotated(one: Tensor, angle: float | Tensor) -> Tensor:
    """Vectors as long as ``one``, at ``angle`` from it."""
    u = one / one.norm(dim=-1, keepdim=True)
    v = torch.randn_like(one)
    v = v - (v * u).sum(-1, keepdim=True) * u
    angle = torch.as_tensor(angle)
    return one.norm(dim=-1, keepdim=True) * (angle.cos() * u + angle.sin() * v / v.norm(dim=-1, keepdim=True))


def between(a: Tensor, b: Tensor) -> Tensor:
    u, v = (x.double() / x.double().norm(dim=-1, keepdim=True) for x in (a, b))
    return 2 * torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))


def read(side: Side) -> tuple[Tensor, Tensor]:
    whole = range(side.direction.shape[1])
    return side.read(0, whole), side.read(1, whole)


@pytest.mark.parametrize("scale", [1.0, 3.5], ids=["identical", "other sizes"])
def test_layers_with_the_same_directions_are_restored_exactly(scale):
    one = torch.randn(H, N, D)
    sizes = scale if scale == 1 else scale * torch.rand(H, N, 1)
    side = merged(one, one * sizes, 0.6, 0.0)
    assert len(side.places) == 0
    for made, wanted in zip(read(side), (one, one * sizes), strict=True):
        torch.testing.assert_close(made, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("angle", [1e-5, 0.3, 1.2, 2.8])
@pytest.mark.parametrize("t", [0.0, 0.35, 0.6])
def test_angles_are_off_by_t_and_by_the_rest_and_sizes_are_exact(angle, t):
    one = 5 * torch.rand(H, N, 1) * torch.randn(H, N, D)
    other = rotated(one, angle) * 0.7
    first, second = read(merged(one, other, t, 0.0))
    assert float((between(one, first) - t * angle).abs().max()) < 1e-5
    assert float((between(other, second) - (1 - t) * angle).abs().max()) < 1e-5
    for made, wanted in ((first, one), (second, other)):
        torch.testing.assert_close(made.norm(dim=-1), wanted.norm(dim=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equal_opposite_and_empty_vectors_give_numbers(dtype):
    one = torch.randn(H, N, D).to(dtype)
    for other in (one, -one, torch.zeros_like(one)):
        for made in (*slerp(one, other, 0.5), *read(merged(one, other, 0.6, 0.05))):
            assert bool(made.isfinite().all())
    # A layer whose vector is empty does not change the other's.
    for made, wanted in zip(read(merged(one, 0 * one, 0.0, 0.0)), (one, 0 * one), strict=True):
        torch.testing.assert_close(made, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.4])
def test_retained_tokens_are_those_of_the_range_and_exact(gamma):
    angle = 0.6 + torch.rand(H, N, 1) ** 3
    one = torch.randn(H, N, D)
    other = rotated(one, angle)
    side = merged(one, other, 0.6, gamma)
    kept = torch.zeros(H, N, dtype=torch.bool)
    for head in range(H):
        cosines = torch.cosine_similarity(one[head].double(), other[head].double(), dim=-1)
        own = [math.acos(min(1.0, float(x))) for x in cosines]
        limit = max(own) - gamma * (max(own) - min(own))
        kept[head] = torch.tensor([a > limit for a in own])
    assert side.places.tolist() == kept.flatten().nonzero()[:, 0].tolist()
    if gamma == 0.4:
        # A share of the range, not of the tokens, and by head.
        assert 0 < kept.sum() < H * gamma * N
    at = torch.zeros(H * N, dtype=torch.bool).index_fill_(0, side.places, True).view(H, N)
    for made, wanted in zip(read(side), (one, other), strict=True):
        assert torch.equal(made[at], wanted[at])
        assert not torch.isclose(made[~at], wanted[~at]).all(dim=-1).any()


def test_equal_angles_retain_nothing():
    assert not apart(torch.full((2, 5), 0.3), 0.5).any()


def test_lists_read_what_ranges_read():
    one, other = torch.randn(H, N, D), torch.randn(H, N, D)
    side = merged(one, other, 0.6, 0.5)
    assert 0 < len(side.places) < H * N
    lists = torch.stack([torch.randperm(N)[:9].sort().values for _ in range(2 * H)])
    for layer, whole in enumerate(read(side)):
        assert torch.equal(side.read(layer, lists[0]), whole[:, lists[0]])
        assert torch.equal(side.read(layer, range(7, 31)), whole[:, 7:31])
        for j, own in enumerate(side.read(layer, lists)):
            assert torch.equal(own, whole[j // 2, lists[j]])
        assert torch.equal(read(side.of(lists[0]))[layer], whole[:, lists[0]])


def filled(spec: str, layers: int = 5, n: int = 70, kind: str = "llama", **given) -> tuple:
    net = tiny.model(kind, num_hidden_layers=layers, **given)
    cache, dense = tiny.cache(net, spec), tiny.cache(net, "dense")
    same = [tiny.feed(net, held, tiny.ids(2, n)) for held in (cache, dense)]
    return net, cache, dense, same


def bodies(cache: kvote.Cache) -> list[MergedBody | None]:
    return [layer.segment.bodies[1] for layer in cache.managed]


@pytest.mark.parametrize(("start", "pairs"), [(0.5, [(2, 3)]), (0.0, [(0, 1), (2, 3)]), (0.3, [(1, 2), (3, 4)])])
def test_layers_are_paired_from_the_start_on(start, pairs):
    _, cache, _, _ = filled(f"minicache(start={start})")
    made = bodies(cache)
    assert [i for i, body in enumerate(made) if body is not None] == [i for pair in pairs for i in pair]
    for first, second in pairs:
        assert made[first].pair is made[second].pair
        assert (made[first].layer, made[second].layer) == (0, 1)


def test_prompts_are_exact_and_lower_layers_stay_so():
    net, cache, dense, (got, wanted) = filled("minicache(gamma=0.1)")
    torch.testing.assert_close(got, wanted)
    pairs = zip(cache.managed, dense.managed, strict=True)
    held = [(own.segment.decode([0, 1], 0, 70), plain.segment.decode([0, 1], 0, 70)) for own, plain in pairs]
    for number, (own, plain) in enumerate(held):
        for side in range(2):
            exact = bool(torch.isclose(own[side], plain[side], atol=1e-6).all())
            assert exact == (number in (0, 1, 4))
    # What the two layers of a pair hold is made of what both had.
    for side in range(2):
        one, other = held[2][1][side][1], held[3][1][side][1]
        for number, made in zip((2, 3), read(merged(one, other, 0.6, 0.1)), strict=True):
            torch.testing.assert_close(held[number][0][side][1], made)
    more = tiny.ids(2, 3, seed=5)
    assert not torch.allclose(tiny.feed(net, cache, more, passes=1), tiny.feed(net, dense, more, passes=1), atol=1e-4)


def test_keys_are_merged_alike_with_and_without_their_rotation():
    """Both layers rotate a token alike, and merging follows any rotation."""
    net, cache, _, _ = filled("minicache")
    other = tiny.cache(net, "minicache | tokenselect(top_k=500)")
    tiny.feed(net, other, tiny.ids(2, 70))
    assert other.managed[0].step_rope is not None
    assert cache.managed[0].step_rope is None
    more = tiny.ids(2, 3, seed=5)
    one, same = (tiny.feed(net, held, more, passes=1) for held in (cache, other))
    torch.testing.assert_close(one, same, atol=1e-4, rtol=1e-4)


def test_bytes_are_a_direction_two_sizes_and_what_is_retained():
    _, cache, _, _ = filled("minicache(gamma=0.1)", n=64)
    heads, dim = cache.managed[2].segment.heads, cache.managed[2].segment.uncompressed.pool.keys.shape[-1]
    for number in (2, 3):
        segment, wanted = cache.managed[number].segment, 0
        for body in segment.bodies:
            for side in (body.pair.key, body.pair.value):
                retained = len(side.places)
                assert 0 < retained < heads * 64
                wanted += heads * 64 * 4 + retained * dim * 4
                if number == 2:
                    wanted += heads * 64 * dim * 4 + retained * 8
            wanted += 64 * 4 if number == 2 else 0
        assert segment.prompts.nbytes == wanted


def test_the_pages_of_merged_prompts_are_given_back():
    _, cache, _, _ = filled("minicache", layers=4, n=1000)
    held = [layer.nbytes for layer in cache.report().layers]
    assert held[0] == held[1]
    assert held[2] + held[3] < 0.8 * held[0] * 2


def test_layers_that_differ_in_shape_stay_whole():
    from kvote.store.merged import MergedPairs
    from kvote.tokens import Queries

    store = MergedPairs(0.0, 0.6, 0.05)
    segments = []
    for heads in (2, 4):
        key = torch.randn(1, heads, 30, D)
        segment = store.new_segment(heads, key, D, None)
        segment.add_sequences(1)
        segment.append([0], key, key, torch.arange(30)[None])
        segment.observe_queries(Queries(torch.randn(1, 4, 30, D)), [0], 0)
        segments.append(segment)
    assert not store.after_layer(segments, 1, 0)
    assert segments[0].bodies == [None]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("minicache(start=1.5)", "start must be a number from 0 to 1"),
        ("minicache(t=-0.1)", "t must be"),
        ("minicache(gamma='all')", "gamma must be"),
        ("minicache(gamma=True)", "gamma must be"),
        ("snapkv | minicache", "layers share what is stored of a token"),
        ("minicache | h2o", "layers share what is stored"),
        ("minicache | xkv", "both decide what to store"),
    ],
)
def test_what_makes_no_sense_is_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)
