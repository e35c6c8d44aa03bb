"""Key heads that are kept in different ways: each group is a layer of its own, and together they answer as one."""

from dataclasses import dataclass

import pytest
import torch

import kvote
from kvote.errors import UnsupportedModelError
from kvote.heads import in_head_groups
from kvote.keep.evict import sinks_and_recent
from kvote.keep.keeper import HeadAssignment
from kvote.keep.policies import KeepAll
from kvote.layer import Step
from kvote.method import Method
from kvote.needs import KeeperOffers
from kvote.read.reader import Everything
from kvote.spec import parse
from kvote.store.segment import Scaling
from kvote.store.uncompressed import Uncompressed
from tests import tiny

DIM = 16


@dataclass(frozen=True)
class ByHead(KeepAll):
    """The named key heads keep everything, the others sinks and a window."""

    whole: tuple[int, ...] = (1,)
    offers = KeeperOffers(equal_layers=True)

    def split(self, layer, heads):
        others = tuple(head for head in range(heads) if head not in self.whole)
        return [HeadAssignment(self.whole, KeepAll()), HeadAssignment(others, sinks_and_recent(2, 6))]


@dataclass(frozen=True)
class ByLayer(ByHead):
    """All heads of the first layer keep everything, and none of the second."""

    def split(self, layer, heads):
        return ByHead(whole=tuple(range(heads)) if layer == 0 else ()).split(layer, heads)


def split(*whole: int) -> Method:
    return Method("split", keep=ByHead(whole=whole))


def step(position: int, kv_heads: int = 2) -> Step:
    key, value = torch.randn(1, kv_heads, 1, DIM), torch.randn(1, kv_heads, 1, DIM)
    return Step(torch.randn(1, 4, 1, DIM), key, value, torch.tensor([[position]]), None, 1, Scaling(0.3), decode=True)


@pytest.mark.parametrize("whole", [(0, 1), (1, 0)])
def test_heads_that_all_keep_everything_answer_as_dense_attention(whole):
    net = tiny.model()
    tokens, mask = tiny.padded(2, 24, [5, 0])
    for kwargs in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        torch.manual_seed(1)
        expected = tiny.generate(net, tokens, tiny.cache(net), mask, **kwargs)
        torch.manual_seed(1)
        mine = tiny.generate(net, tokens, kvote.Cache(net, split(*whole)), mask, **kwargs)
        assert torch.equal(mine.sequences, expected.sequences)
        torch.testing.assert_close(mine.logits, expected.logits, atol=1e-4, rtol=1e-4)


def test_each_group_holds_its_own_number_of_tokens_and_the_bytes_are_their_sum():
    net = tiny.model()
    cache = kvote.Cache(net, split(1))
    tiny.feed(net, cache, tiny.ids(1, 400))
    few, whole = cache.positions(0)[0]
    assert whole.tolist() == list(range(400))
    assert few.tolist() == [0, 1, *range(394, 400)]
    full, short = (layer.segment.pool for layer in cache.managed[:2])
    assert full.keys.shape[0] >= 4 * short.keys.shape[0]
    report = cache.report()
    assert report.layers[0].dropped == 392
    assert report.nbytes == cache.nbytes() == sum(layer.nbytes for layer in cache.managed)


def test_heads_that_dropped_tokens_attend_to_what_they_kept():
    """Against attention written out, head by head."""
    net = tiny.model()
    cache = kvote.Cache(net, split(1))
    tiny.feed(net, cache, tiny.ids(1, 39))
    held = {1: cache.managed[0].segment, 0: cache.managed[1].segment}
    held = {head: [part.clone() for part in s.decode([0], 0, s.length(0))] for head, s in held.items()}
    asked = step(39)
    answer = cache.layers[0].layer.attend(asked)
    for head in range(4):
        own = head // 2
        key = torch.cat([held[own][0], asked.key[:, own : own + 1]], dim=2)
        value = torch.cat([held[own][1], asked.value[:, own : own + 1]], dim=2)
        assert key.shape[2] == (40, 9)[own == 0]
        weights = (0.3 * asked.query[:, head : head + 1] @ key.mT).softmax(-1)
        torch.testing.assert_close(answer[:, :, head], (weights @ value)[:, 0])


def test_a_crop_is_refused_once_a_group_has_dropped_tokens():
    net = tiny.model()
    cache = kvote.Cache(net, split(1))
    tiny.feed(net, cache, tiny.ids(1, 39))
    assert not cache.is_croppable
    with pytest.raises(kvote.CropError, match="split has dropped tokens"):
        cache.crop(-3)
    assert [len(each) for each in cache.positions(0)[0]] == [8, 39]


@dataclass(frozen=True)
class Apart(KeepAll):
    """Key head 0 keeps few tokens apart, and every other head all."""

    offers = KeeperOffers(drops_generated=False, equal_layers=True)

    def split(self, layer, heads):
        few, others = sinks_and_recent(2, 6), tuple(range(1, heads))
        return [HeadAssignment((0,), few, dense=True, budget_shares=7.5), HeadAssignment(others, KeepAll())]


def test_a_share_apart_holds_and_reads_as_the_model_made_it():
    reader = parse("tokenselect(top_k=5, sinks=2, window=6, sketch='int8')").read
    joined = Method("apart", keep=Apart(), read=reader)
    few, others = (group.layer for group in in_head_groups(0, joined, None, 3, 4).head_groups)
    assert (few.method.store, few.method.read, few.layers) == (Uncompressed(), Everything(), 7.5)
    assert (others.method.read, others.layers) == (reader, 3)
    assert not few.method.unrotated
    assert others.method.unrotated


def test_a_layer_with_other_key_heads_than_the_config_tells_is_refused():
    net = tiny.model()
    cache = kvote.Cache(net, split(1))
    with pytest.raises(UnsupportedModelError, match="4 key heads and not the 2"):
        cache.layers[0].layer.attend(step(0, kv_heads=4))


def test_a_crop_that_one_layer_refuses_changes_none():
    """Heads that keep everything could take it back; those of another layer that drop could not."""
    net = tiny.model()
    cache = kvote.Cache(net, Method("split", keep=ByLayer()))
    tiny.feed(net, cache, tiny.ids(1, 40))
    with pytest.raises(kvote.CropError, match="split has dropped tokens"):
        cache.crop(-3)
    assert [layer.layer.seen for layer in cache.layers] == [40, 40]
    assert [len(each) for each in cache.positions(0)[0]] == [40, 40]


def test_a_mask_that_one_layer_refuses_changes_none():
    net = tiny.model()
    cache = kvote.Cache(net, Method("split", keep=ByLayer()))
    tokens, mask = tiny.ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    tiny.feed(net, cache, tokens, mask)
    changed = torch.cat([mask, mask[:, :1]], dim=1)
    changed[0, :4] = 0
    with pytest.raises(kvote.InputError, match="mask changed"):
        tiny.feed(net, cache, tokens[:, :1], changed)
    assert [len(each) for each in cache.positions(0)[0]] == [20, 20]
