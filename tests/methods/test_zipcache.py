"""ZipCache: values by channel and token, saliency by normalised attention of probes, bits and bytes."""

import pytest
import tiny
import torch
from torch import Tensor

from kvote import MethodError
from kvote.methods import zipcache
from kvote.store import probed
from kvote.store import saliency as saliency_of
from kvote.store.saliency import Probes, chosen, drawn, saliency
from kvote.store.salient import Bits, encode
from kvote.store.segment import Scaling

BITS = Bits(4, 2)


def plain(x: Tensor, bits: int, dim: int) -> Tensor:
    """What numbers decode to that share minimum and scale along ``dim``."""
    least, most = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (most - least) / (2**bits - 1)
    return ((x - least) / step).round() * step + least


def tokens(h: int = 2, n: int = 40, d: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and values [h, n, d], which are salient, and positions; in each head 24 of 40."""
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, h, n, d, generator=generator)
    salient = chosen(torch.rand(h, n, generator=generator), 0.6)
    return key, value, salient, torch.arange(n, dtype=torch.int32).expand(h, n)


def test_values_are_divided_by_the_root_of_their_channels_and_rounded_by_token():
    key, value, salient, places = tokens()
    value[:, :, 5] *= 100
    got = encode(key, value, salient, places, BITS).read(range(40))[1]
    factor = value.abs().amax(1, keepdim=True).sqrt()
    scaled = value / factor
    for which, bits in ((salient, 4), (~salient, 2)):
        # The i-th tokens of all heads are one row.
        rows = torch.stack([scaled[head, which[head]] for head in range(2)], dim=1)
        law = plain(rows.flatten(1), bits, 1).view(rows.shape)
        for head in range(2):
            torch.testing.assert_close(got[head, which[head]], law[:, head] * factor[head], atol=1e-4, rtol=1e-4)
    others = [i for i in range(32) if i != 5]
    by_token = plain(value.transpose(0, 1).flatten(1), 4, 1).view(40, 2, 32).transpose(0, 1)
    got = encode(key, value, salient, places, Bits(4, 4)).read(range(40))[1]
    errors = [(x - value)[..., others].square().mean() for x in (got, by_token)]
    assert errors[0] < errors[1] / 10


def test_keys_are_rounded_by_channel_over_all_tokens_of_their_kind():
    key, value, salient, places = tokens()
    got = encode(key, value, salient, places, BITS).read(range(40))[0]
    for which, bits in ((salient, 4), (~salient, 2)):
        for head in range(2):
            law = plain(key[head, which[head]], bits, 0)
            torch.testing.assert_close(got[head, which[head]], law, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("d", [32, 30])
def test_one_kind_alone_and_odd_sizes(share, d):
    key, value, _, places = tokens(n=7, d=d)
    body = encode(key, value, chosen(torch.rand(2, 7), share), places, BITS)
    law = plain(key, 4 if share else 2, 1)
    torch.testing.assert_close(body.read(range(7))[0], law, atol=1e-5, rtol=1e-5)


def test_channels_of_zeros_and_equal_numbers_come_back():
    key, value, salient, places = tokens()
    value[:, :, 3], key[:, :, 4] = 0, 0.5
    got = encode(key, value, salient, places, BITS).read(range(40))
    assert all(bool(part.isfinite().all()) for part in got)
    assert bool((got[0][:, :, 4] == 0.5).all())


def test_ranges_lists_and_lists_of_query_heads_give_the_same():
    key, value, salient, places = tokens()
    body = encode(key, value, salient, places, BITS)
    whole = body.read(range(40))
    lists = torch.stack([torch.randperm(40)[:9].sort().values for _ in range(4)])
    for got, all_of in zip(body.read(lists), whole, strict=True):
        assert torch.equal(got, all_of.repeat_interleave(2, 0).gather(1, lists[..., None].expand(-1, -1, 32)))
    for got, all_of in zip(body.read(range(7, 21)), whole, strict=True):
        assert torch.equal(got, all_of[:, 7:21])


def test_the_first_tokens_keep_their_codes_and_others_are_rounded_again():
    key, value, salient, places = tokens()
    body = encode(key, value, salient, places, BITS)
    first = body.keep(torch.arange(23).expand(2, -1))
    for got, all_of in zip(first.read(range(23)), body.read(range(40)), strict=True):
        assert torch.equal(got, all_of[:, :23])
    assert torch.equal(first.salient(), salient[:, :23])
    index = torch.tensor([[0, 3, 9, 30], [1, 2, 17, 39]])
    some = body.keep(index)
    assert torch.equal(some.salient(), salient.gather(1, index))
    assert torch.equal(some.positions, index.int())


def probes_of(n: int, slots: Tensor, heads: int = 2, d: int = 8) -> tuple[Probes, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(heads, n, d, generator=generator), torch.randn(1, n, d, generator=generator)
    return Probes(query[:, slots], slots, slots), key


@pytest.mark.parametrize("start", [0, 11])
@pytest.mark.parametrize("weights", [1 << 24, 100])
def test_saliency_is_what_probes_pay_over_how_many_see_the_token(start, weights, monkeypatch):
    monkeypatch.setattr(saliency_of, "_WEIGHTS", weights)
    probes, key = probes_of(30, torch.tensor([12, 17, 28, 29]))
    scores = torch.einsum("hpd,nd->hpn", probes.query, key[0]) / 8**0.5
    mask = torch.arange(30) <= probes.slots[:, None]
    paid = scores.masked_fill(~mask, float("-inf")).softmax(-1).sum((0, 1))
    got = saliency(probes, key, start, Scaling(8**-0.5))
    torch.testing.assert_close(got[0], (paid / mask.sum(0))[start:])


def test_even_attention_gives_early_tokens_no_advantage():
    """Of uniform causal maps, sums fall with the position and what is normalised does not."""
    slots = torch.arange(64)
    probes = Probes(torch.zeros(1, 64, 8), slots, slots)
    got = saliency(probes, torch.zeros(1, 64, 8), 0, Scaling(1.0))[0]
    sums = got * (64 - slots)
    assert bool((sums.diff() < 0).all())
    # The mean over rows i >= j of 1 / (i + 1).
    mean = torch.stack([(1 / (slots[j:] + 1.0)).mean() for j in range(64)])
    torch.testing.assert_close(got, mean)
    assert got.max() / got.min() < 5 < sums.max() / sums.min() / 40


def test_the_lowest_of_each_head_are_the_others():
    scores = torch.rand(3, 50, generator=torch.Generator().manual_seed(1))
    salient = chosen(scores, 0.6)
    assert salient.sum(1).tolist() == [30] * 3
    for head in range(3):
        assert scores[head][~salient[head]].max() < scores[head][salient[head]].min()


def test_a_lot_is_the_same_whenever_it_is_drawn():
    places = torch.arange(20_000)
    lot = drawn(places, 0.05, 7)
    assert 0.045 < lot.float().mean() < 0.055
    assert torch.equal(drawn(places[123:456], 0.05, 7), lot[123:456])
    # Another seed draws others.
    assert 0.02 < (lot & drawn(places, 0.05, 8)).sum() / lot.sum() < 0.08


@pytest.mark.parametrize("passes", [0, 13])
def test_a_prompt_is_judged_by_its_probes_when_it_has_ended(passes):
    net, ids, n = tiny.model(), tiny.ids(1, 90, seed=2), 90
    cache, dense = tiny.cache(net, "zipcache"), tiny.cache(net, "dense")
    cache.expect(n)
    kept: list[Probes] = []
    encode_row = probed.ProbedSegment._encode

    def note(self, row):
        kept.append(self.probes[row])
        encode_row(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probed.ProbedSegment, "_encode", note)
        tiny.feed(net, cache, ids, passes=passes)
    tiny.feed(net, dense, ids)
    recent = torch.arange(n) >= n - int(0.05 * n)
    slots = (recent | drawn(torch.arange(n), 0.05, 0)).nonzero()[:, 0]
    for probes, layer, whole in zip(kept, cache.managed, dense.managed, strict=True):
        assert torch.equal(probes.slots, slots)
        key = whole.segment.decode([0], 0, n)[0][0]
        scores = saliency(probes, key, 0, Scaling(key.shape[-1] ** -0.5))
        assert torch.equal(layer.segment.prompts.bodies[0].salient(), chosen(scores, 0.6))


def test_generated_tokens_are_encoded_by_the_gap_and_error_does_not_run_away():
    net, ids = tiny.model(), tiny.ids(1, 64, seed=2)
    cache, dense = tiny.cache(net, "zipcache(gap=10, high_bits=8, low_bits=8)"), tiny.cache(net, "dense")
    for each in (cache, dense):
        tiny.feed(net, each, ids)
    errors, flags = [], cache.managed[0].segment.prompts.bodies[0].salient()
    for i in range(60):
        for each in (cache, dense):
            tiny.feed(net, each, tiny.ids(1, 1, 100 + i))
        segment = cache.managed[0].segment
        assert segment.encoded(0) == 64 + (i + 1) // 10 * 10
        if i % 10 == 9:
            mine, exact = (each.managed[0].segment.decode([0], 0, 64)[0] for each in (cache, dense))
            errors.append(float((mine - exact).square().mean()))
    body = segment.prompts.bodies[0]
    assert torch.equal(body.salient()[:, :64], flags)
    assert body.salient()[:, 64:].sum(1).tolist() == [36, 36]
    assert errors[-1] < 4 * errors[0]


def test_bits_and_bytes_are_those_of_the_formula():
    h, n, d = 8, 1000, 128
    key, value, salient, places = (x.bfloat16() if x.is_floating_point() else x for x in tokens(h, n, d))
    body = encode(key, value, salient, places, BITS)
    codes = 2 * h * n * d * (0.6 * 4 + 0.4 * 2) / 8
    # Two numbers per key channel and kind, two per row of values, one per value channel; bits; positions.
    beside = 2 * (2 * 2 * h * d + 2 * n + h * d) + h * n / 8 + 4 * n
    assert sum(part.untyped_storage().nbytes() for part in body.tensors) == codes + beside


def test_four_bits_for_what_matters_are_better_than_for_what_does_not():
    """Read by the probes themselves."""
    net, ids = tiny.model(), tiny.ids(8, 120, seed=5)
    dense = tiny.cache(net, "dense")
    tiny.feed(net, dense, ids)
    new = tiny.ids(8, 1, 6)
    law, errors = tiny.feed(net, dense, new).softmax(-1), []
    for least in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if least:
                patch.setattr(probed, "chosen", lambda scores, share: chosen(-scores, share))
            cache = tiny.cache(net, "zipcache(share=0.3, high_bits=8)")
            tiny.feed(net, cache, ids)
        errors.append(float((tiny.feed(net, cache, new).softmax(-1) - law).abs().sum()))
    assert errors[0] < errors[1]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"high_bits": 3}, "high_bits must be 2, 4 or 8; got 3"),
        ({"low_bits": True}, "low_bits must be 2, 4 or 8; got True"),
        ({"share": 1.5}, "share must be a number from 0 to 1; got 1.5"),
        ({"probes": 0}, "probes must be a number above 0 and at most 1; got 0"),
        ({"gap": 0}, "gap must be a whole number of at least 1; got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0; got -1"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(given, sentence):
    with pytest.raises(MethodError, match=sentence):
        zipcache(**given)
