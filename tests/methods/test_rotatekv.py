"""RotateKV: rotated codes and exact sinks, and which tokens are sinks."""

import pytest
import tiny
import torch
from torch import Tensor

import kvote
from kvote import MethodError
from kvote.calibration.measure import measure_rotated
from kvote.calibration.rotated import orders_of
from kvote.kernels import packing
from kvote.methods import rotatekv
from kvote.store.apart import ApartSegment, Largest
from kvote.store.transform import Rotated

SINKS = 5


def published(x: Tensor, bits: int, clip: float) -> Tensor:
    """What numbers [..., n] of one group decode to, by the published quantiser."""
    most, least = x.amax(-1, keepdim=True) * clip, x.amin(-1, keepdim=True) * clip
    scale = (most - least) / (2**bits - 1)
    zero = torch.round(-least / scale)
    return scale * ((torch.round(x / scale) + zero).clamp(0, 2**bits - 1) - zero)


@pytest.mark.parametrize(("bits", "clip"), [(2, 0.8), (2, 1.0), (4, 1.0), (4, 0.9)])
@pytest.mark.parametrize("offset", [0.0, 3.0, -30.0])
def test_numbers_are_rounded_as_published(bits, clip, offset):
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0)) + offset
    got = packing.dequantise(*packing.quantise_clipped(x, bits, clip))
    torch.testing.assert_close(got, published(x, bits, clip), atol=1e-5, rtol=1e-5)
    other = packing.dequantise(*packing.quantise(x, bits))
    assert not torch.allclose(got, other, atol=1e-3)


def test_equal_numbers_decode_to_themselves():
    x = torch.full((2, 32), 0.3)
    assert torch.equal(packing.dequantise(*packing.quantise_clipped(x, 2, 0.8)), x)


def test_numbers_of_double_precision_are_rounded_as_those_of_single():
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    got, expected = (packing.dequantise(*packing.quantise_clipped(each, 2, 0.8)) for each in (x.double(), x))
    torch.testing.assert_close(got, expected.double())


def entering(net, tokens: Tensor) -> list[Tensor]:
    """What enters each layer, [columns, width]."""
    found = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, kwargs: found.append(args[0][0]), with_kwargs=True)
        for layer in net.model.layers
    ]
    with torch.no_grad():
        net(input_ids=tokens)
    for hook in hooks:
        hook.remove()
    return found


def sinks_of(states: Tensor, count: int) -> set[int]:
    """The tokens of the ``count`` largest entries."""
    return set((states.abs().flatten().topk(count).indices // states.shape[1]).tolist())


@pytest.mark.parametrize("passes", [0, 7, 33])
def test_sinks_are_the_tokens_with_the_largest_entries_and_stay_exact(passes):
    net, tokens = tiny.model(), tiny.ids(1, 90, seed=4)
    cache, dense = tiny.cache(net, f"rotatekv(sinks={SINKS})"), tiny.cache(net, "infllm(window=500)")
    cache.expect(90)
    tiny.feed(net, cache, tokens, passes=passes)
    tiny.feed(net, dense, tokens)
    for layer, whole, states in zip(cache.managed, dense.managed, entering(net, tokens), strict=True):
        sinks = sinks_of(states, SINKS)
        assert 1 < len(sinks) <= SINKS
        got, exact = (each.segment.decode([0], 0, 90) for each in (layer, whole))
        for mine, other in zip(got, exact, strict=True):
            same = [bool(torch.allclose(mine[0, :, i], other[0, :, i], atol=2e-4, rtol=0)) for i in range(90)]
            assert {i for i in range(90) if same[i]} == sinks
        segment = layer.segment
        assert isinstance(segment, ApartSegment)
        assert len(segment.packed.exact[0].slots) == segment.heads * len(sinks)


def test_without_sinks_none_is_exact():
    net, tokens = tiny.model(), tiny.ids(1, 90, seed=4)
    cache = tiny.cache(net, "rotatekv(sinks=0)")
    tiny.feed(net, cache, tokens)
    assert all(len(layer.segment.packed.exact[0].slots) == 0 for layer in cache.managed)


def test_each_sequence_has_its_own_sinks_and_generated_tokens_are_none():
    net = tiny.model()
    tokens, mask = tiny.padded(2, 80, [23, 0])
    cache = tiny.cache(net, f"rotatekv(sinks={SINKS})")
    tiny.feed(net, cache, tokens, mask)
    before = [layer.segment.packed.exact for layer in cache.managed]
    for row, pads in enumerate([23, 0]):
        for layer, states in zip(cache.managed, entering(net, tokens[row : row + 1, pads:]), strict=True):
            assert set(layer.segment.packed.exact[row].slots.tolist()) == sinks_of(states, SINKS)
    mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], dim=1)
    tiny.feed(net, cache, tiny.ids(2, 5, 3), mask, passes=1)
    assert all(exact is layer.segment.packed.exact for exact, layer in zip(before, cache.managed, strict=True))
    assert all(layer.segment.values.length(1) == 85 for layer in cache.managed)


@pytest.mark.parametrize("stop", [1, 13, 40, 64])
def test_the_largest_are_those_of_all_prefixes(stop):
    """So tokens that are taken back leave no trace."""
    states = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    found = Largest(torch.empty(0), torch.empty(0, dtype=torch.int64))
    for part in (range(20), range(20, 21), range(21, 64)):
        found = found.and_of(states[part], torch.tensor(part), SINKS)
    assert set(found.before(stop).only(SINKS).positions.tolist()) == sinks_of(states[:stop], SINKS)
    assert len(found.sizes) < 64 * 8 / 4


def test_rotation_order_and_what_undoes_them_cancel(monkeypatch):
    """In 8 bits logits are near those of the model; where the order is not undone, they are not."""
    net, tokens, new = tiny.model(), tiny.ids(1, 90), tiny.ids(1, 4, 3)
    order = measure_rotated(net, [tiny.ids(2, 60, seed=77)])
    dense = tiny.cache(net, "dense")
    tiny.feed(net, dense, tokens)
    law = tiny.feed(net, dense, new)

    def distance() -> float:
        cache = kvote.Cache(net, rotatekv(order, bits=8, sinks=0))
        tiny.feed(net, cache, tokens)
        return float((tiny.feed(net, cache, new) - law).abs().max())

    assert distance() < 0.3
    undo = Rotated.undo
    monkeypatch.setattr(Rotated, "undo", lambda self, x: undo(Rotated(self.heads), x))
    assert distance() > 3


def test_the_order_is_that_of_the_sums_of_rotated_keys_without_position():
    net = tiny.model()
    made = measure_rotated(net, [tiny.ids(1, 64, seed=1)])
    cache = tiny.cache(net, "infllm(window=500)")
    tiny.feed(net, cache, tiny.ids(1, 64, seed=1))
    for (layer, order), held in zip(orders_of(made, 4), cache.managed, strict=True):
        key = held.segment.decode([0], 0, 64)[0][0]
        both = key.transpose(0, 1).reshape(64, -1)
        signs = torch.ones(1, 1)
        while len(signs) < both.shape[1]:
            signs = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), signs)
        sums = (both @ signs / len(signs) ** 0.5).sum(0)
        assert held.index == layer
        assert sorted(order) == list(range(len(sums)))
        assert bool((sums[list(order)].diff() > -1e-3).all())
    with pytest.raises(MethodError, match="was measured with 4 key heads rotated together, not with 2"):
        rotatekv(made, heads=2)
    rotated = kvote.Cache(net, rotatekv(made))
    tiny.feed(net, rotated, tiny.ids(1, 64, seed=1))
    for (_, order), held in zip(orders_of(made, 4), rotated.managed, strict=True):
        assert tuple(held.segment.keys.transform.order.tolist()) == order


def test_the_bytes_are_those_of_the_formula():
    n, heads, dim = 8192, 8, 128
    held = rotatekv(sinks=0).store.new_segment(heads, torch.empty(0, dim, dtype=torch.bfloat16), dim, None)
    held.add_sequences(1)
    x = torch.randn(1, heads, n, dim).bfloat16()
    held.append([0], x, x, torch.arange(n)[None])
    held.compress(0)
    # 2 bits, and a scale and a minimum of 16 bits for 128 numbers.
    body = 2 * 2.25 / 8 * dim * heads * n + 4 * n
    assert body <= held.nbytes < 1.03 * body


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"bits": 3}, "bits must be 2, 4 or 8; got 3"),
        ({"group": 16}, "group must be 32, 64 or 128; got 16"),
        ({"heads": 0}, "heads must be a whole number of at least 1; got 0"),
        ({"sinks": -1}, "sinks must be a whole number of at least 0; got -1"),
        ({"clip": 0}, "clip must be a number above 0 and at most 1; got 0"),
        ({"order": 3}, "order must be the name of a file; got 3"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(given, sentence):
    with pytest.raises(MethodError, match=sentence):
        rotatekv(**given)


def test_embeddings_without_token_ids_do():
    net = tiny.model()
    cache = kvote.Cache(net, "rotatekv")
    embeds = net.model.embed_tokens(tiny.ids(1, 8)).detach()
    with torch.no_grad():
        net(inputs_embeds=embeds, past_key_values=cache)
    assert cache.get_seq_length() == 8
