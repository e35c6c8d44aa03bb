"""What generate() and its users do to a cache, the same for every method."""

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scored
import tiny
import torch
from calibrated import double_sparsity
from torch import Tensor
from transformers import PreTrainedModel

import kvote
from kvote import CropError, Method
from kvote.settling import drop
from kvote.spec import parse
from kvote.store import disk_region
from kvote.store.offloaded import OffloadedSegment

_ALL = "top_k=500, sinks=2, window=6, chunk=4"
_FEW = "top_k=5, sinks=2, window=6"
# Lossy ones select token by token (chunk=1, or all in the tail), so that passes do not change what a query reads.
METHODS = {
    "dense": "dense",
    "streamingllm-all": "streamingllm(sinks=2, window=500)",
    "streamingllm": "streamingllm(sinks=2, window=9)",
    "tokenselect-all": f"tokenselect({_ALL})",
    "tokenselect": f"tokenselect({_FEW}, chunk=1, tail=0, theta=2.0)",
    "tokenselect-tail": f"tokenselect({_FEW}, chunk=16, tail=500, theta=2.0)",
    "random": f"random({_FEW}, chunk=16, tail=500)",
    "streamingllm-burst": "streamingllm(sinks=2, window=9, burst=3)",
    "h2o-all": "h2o(budget=500)",
    "h2o": "h2o(budget=20)",
    "h2o-burst": "h2o(budget=20, burst=3)",
    "keyformer-all": "keyformer(budget=500)",
    "keyformer": "keyformer(budget=20)",
    "critic-all": "critic(budget=500)",
    "critic": "critic(budget=20)",
    "prefixkv-all": "prefixkv(budget=500)",
    "prefixkv": "prefixkv(budget=20)",
    "kvcrush-all": "kvcrush(budget=500, window=6)",
    "kvcrush": "kvcrush(budget=20, window=6)",
    "snapkv-all": "snapkv(budget=500, window=6)",
    "snapkv": "snapkv(budget=20, window=6)",
    "knorm-all": "knorm(budget=500)",
    "knorm": "knorm(budget=20)",
    "expectedattention-all": "expectedattention(budget=500)",
    "expectedattention": "expectedattention(budget=20, sinks=2, future=16)",
    "expectedattention-even": "expectedattention(budget=20, sinks=2, future=16, per_head=False)",
    # A smaller budget asks for the prompt to be read again: tests/methods/test_kvzip.py.
    "kvzip-all": "kvzip(budget=500)",
    "adakv-all": "adakv(budget=500, window=6)",
    "adakv": "adakv(budget=20, window=6, safeguard=0.1)",
    "pyramidkv-all": "pyramidkv(budget=500, window=6)",
    "pyramidkv": "pyramidkv(budget=20, window=6, beta=4)",
    "randomkeep-all": "randomkeep(budget=500, window=6)",
    "randomkeep": "randomkeep(budget=20, sinks=2, window=6)",
    "randomkeep-protect": "randomkeep(budget=20, sinks=2, window=6, protect=0.25, evict_generated=True)",
    "randomkeep-tokenselect": f"randomkeep(budget=20, sinks=2, window=6) | tokenselect({_FEW}, chunk=1, theta=2.0)",
    "tidaldecode-all": "tidaldecode(top_k=500, first=0)",
    "tidaldecode": "tidaldecode(top_k=5, first=0)",
    "doublesparsity-all": double_sparsity(top_k=500, dense_layers=0),
    "doublesparsity": double_sparsity(top_k=5, share=0.5, dense_layers=1),
    "quest-all": "quest(token_budget=500, dense_layers=0)",
    "oracle-all": "oracle(top_k=500)",
    "quest": "quest(token_budget=12, page=4, dense_layers=0)",
    "sparq-all": "sparq(top_k=500)",
    "sparq": "sparq(rank=4, top_k=6, local=2)",
    "delta-all": "delta(full=(0,))",
    "delta": "delta(full=(0,), pages=3, recent=1, page=4)",
    "kivi-delta": "kivi(residual=32) | delta(full=(0,), pages=3, recent=1, page=4)",
    "infllm-all": "infllm(window=500)",
    "infllm": "infllm(block=4, sinks=2, window=32, top_k=2, representatives=2, chunk=1)",
    "actqkv-all": "actqkv(window=500)",
    "actqkv": "actqkv(block=4, sinks=2, window=32, top_k=2, representatives=2, chunk=1, least=1, ramp=8, warm=2)",
    "sentencekv-all": "sentencekv(ends=(7, 9), tokens=500)",
    "sentencekv": "sentencekv(ends=(7, 9, 20, 33), tokens=16, factor=2.0, window=6, first=2, last=4)",
    "mpcache-all": "mpcache(budget=500, coarse=1.0, fine=1.0)",
    "mpcache": "mpcache(budget=40, cluster=2, coarse=0.5, fine=0.3)",
    "mpcache-pairs": "mpcache(budget=40, cluster=2, share=2)",
    "loopserve-all": "loopserve(alpha=1.0, top_k=500)",
    "loopserve": "loopserve(alpha=1.0, top_k=12, every=2, window=3)",
    "tim-all": "tim(opens=(7,), closes=(9,), threshold=500)",
    "tim": "tim(opens=(7, 12, 20, 90, 130, 200), closes=(9, 33, 70, 100, 180), threshold=1)",
    "minference-all": "minference(slash=500)",
    "minference": "minference(pattern='a_shape', sinks=2, local=9, block=4)",
    "minference-tokenselect": "minference(pattern='a_shape', sinks=2, local=9, block=4) | "
    f"tokenselect({_FEW}, tail=0, theta=2.0)",
    "h2o-quest": "h2o(budget=20) | quest(token_budget=6, page=2, dense_layers=0)",
    "h2o-doublesparsity": lambda net: parse("h2o(budget=20)") | double_sparsity(top_k=5, dense_layers=0)(net),
    "cake-all": "cake(budget=500, window=6)",
    "cake": "cake(budget=20, window=6)",
    "cake-burst": "cake(budget=20, window=6, burst=3)",
    "cake-prompts": "cake(budget=20, window=6, evict_generated=False)",
    "ems-all": "ems(budget=500, window=6)",
    "ems": "ems(budget=24, window=6, threshold=0.1)",
    "mikv-all": "mikv(budget=500)",
    "mikv": "mikv(budget=20)",
    "mikv-burst": "mikv(budget=20, burst=3)",
    "mikv-4": "mikv(budget=0.3, low_bits=4, balancer=False)",
    "snapkv-tokenselect": f"snapkv(budget=20, window=6, per_head=False) | tokenselect({_FEW}, chunk=1, theta=2.0)",
    "kivi-all": "kivi(residual=512)",
    "kivi": "kivi(residual=32)",
    "kivi-4": "kivi(bits=4, group=32, residual=64)",
    "kivi-tokenselect": f"kivi(residual=32) | tokenselect({_FEW}, chunk=1, tail=0, theta=2.0)",
    "kivi-tidaldecode": "kivi(residual=32) | tidaldecode(top_k=5, first=0)",
    "snapkv-kivi": "snapkv(budget=48, window=6) | kivi(residual=32)",
    "rotatekv": "rotatekv(sinks=3)",
    "rotatekv-tokenselect": f"rotatekv(sinks=3) | tokenselect({_FEW}, chunk=1, tail=0, theta=2.0)",
    "rotatekv-infllm": "rotatekv(bits=4, sinks=3) | "
    "infllm(block=4, sinks=2, window=32, top_k=2, representatives=2, chunk=1)",
    "snapkv-rotatekv": "snapkv(budget=48, window=6) | rotatekv(sinks=3)",
    "zipcache": "zipcache(gap=20, share=0.5)",
    "zipcache-tidaldecode": "zipcache(gap=20, share=0.3) | tidaldecode(top_k=5, first=0)",
    "snapkv-zipcache": "snapkv(budget=48, window=6) | zipcache(gap=20, share=0.5)",
    "razorattention-all": "razorattention(heads='{razor}', induction=0.5)",
    "razorattention": "razorattention(heads='{razor}', induction=0.5, sinks=2, least=8, share=0.1)",
    "razorattention-burst": "razorattention(heads='{razor}', induction=0.5, budget=12, sinks=2, burst=3)",
    "razorattention-none": "razorattention(heads='{razor}', induction=0, echo=0, sinks=2, least=8, share=0.0)",
    "razorattention-tokenselect": "razorattention(heads='{razor}', induction=0.5, sinks=2, least=8, share=0.1) | "
    f"tokenselect({_FEW}, chunk=1, tail=0, theta=2.0)",
    "razorattention-kivi": "razorattention(heads='{razor}', induction=0.5, sinks=2, least=8, share=0.1) | "
    "kivi(residual=32)",
    "cake-kivi-tokenselect": "cake(budget=48, window=6, per_head=False, evict_generated=False) | kivi(residual=32) | "
    f"tokenselect({_FEW}, chunk=1, tail=0, theta=2.0)",
    "duoattention-all": "duoattention(heads='{duo}', window=500)",
    "duoattention": "duoattention(heads='{duo}', sinks=2, window=9)",
    "compresskv-all": "compresskv(heads='{semantic}', budget=500)",
    "compresskv": "compresskv(heads='{semantic}', budget=24, first_k=2, window=6, least=8, most=2)",
    "think-all": "think(ratio=0.0, window=6, recent=5)",
    "think": "think(ratio=0.5, window=6, recent=5)",
    "snapkv-think": "snapkv(budget=20, window=6) | think(ratio=0.5, window=6, recent=5)",
    "h2o-think": "h2o(budget=20) | think(ratio=0.5, window=6, recent=5)",
    "think-tidaldecode": "think(ratio=0.5, window=6, recent=5) | tidaldecode(top_k=5, first=0)",
    "razorattention-think": "razorattention(heads='{razor}', induction=0.5, sinks=2, least=8, share=0.1) | "
    "think(ratio=0.5, window=6, recent=5)",
    "offload": "offload(recent=3)",
    "h2o-offload": "h2o(budget=66, burst=1) | offload(recent=1)",
    "offload-tokenselect": f"offload(recent=3) | tokenselect({_FEW}, chunk=1, tail=0, theta=2.0)",
    "xkv-all": "xkv(group=2, key_rank=1.0, value_rank=1.0)",
    "xkv": "xkv(group=2, key_rank=6, value_rank=6)",
    "minicache-all": "minicache(start=1.0)",
    "minicache": "minicache(start=0.0, gamma=0.2)",
    "minicache-tokenselect": f"minicache(start=0.0) | tokenselect({_FEW}, chunk=1, tail=0, theta=2.0)",
    "xkv-tokenselect": f"xkv(group=2, key_rank=6, value_rank=6) | tokenselect({_FEW}, chunk=1, tail=0, theta=2.0)",
}
# What a prompt in one pass lets all heads read is more than passes do: so it is published.
PASSES_MATTER = "duoattention"
# Short passes that may be rolled back are drafts, and read what generated tokens do.
PROMPTS_ALONE = "minference"
# What a prompt's end has encoded stays so when the prompt is rolled back into.
STAYS_ENCODED = tuple(
    METHODS[name]
    for name in (
        "think",
        "think-tidaldecode",
        "xkv",
        "xkv-tokenselect",
        "zipcache",
        "zipcache-tidaldecode",
        "minicache",
        "minicache-tokenselect",
    )
)
COLUMNS = 70


# What keeps and reads everything does little that the same method does not do with a small budget; and these stores are
# asked alone.
SLOW = {
    name: pytest.mark.slow
    for name in METHODS
    if name.endswith("-all") or ("-" in name and ("rotatekv" in name or "zipcache" in name))
}


@pytest.fixture(params=[pytest.param(spec, id=name, marks=SLOW.get(name, ())) for name, spec in METHODS.items()])
def method(request: pytest.FixtureRequest, net: PreTrainedModel) -> str | Callable[[PreTrainedModel], Method]:
    if callable(request.param):
        return request.param
    return scored.written(net, request.param)


# How query heads share key heads is asked of every method where it can go wrong; all else is asked of one model.
SHARING = pytest.mark.parametrize("net", [1, 4, 7], ids="gqa{}".format, indirect=True)


@pytest.fixture(params=[4], ids="gqa{}".format)
def net(request: pytest.FixtureRequest) -> PreTrainedModel:
    heads = 2 * request.param
    return tiny.model(hidden_size=16 * heads, head_dim=16, num_attention_heads=heads, num_key_value_heads=2)


@pytest.fixture(params=[[0, 0, 0], [11, 0, 66]], ids=["unpadded", "padded"])
def batch(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor | None]:
    tokens, mask = tiny.padded(3, COLUMNS, request.param)
    return tokens, mask if any(request.param) else None


def cut(mask: Tensor | None, columns: int) -> Tensor | None:
    return None if mask is None else mask[:, :columns]


def same(mine: Tensor, other: Tensor, mask: Tensor | None = None) -> None:
    """Logits agree, wherever there is a token."""
    if mask is not None:
        at = mask[:, -mine.shape[1] :].bool()
        mine, other = mine[at], other[at]
    torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def more(rows: int, mask: Tensor | None, columns: int = 3, seed: int = 9) -> tuple[Tensor, Tensor | None]:
    """Further tokens for every row, and the mask that covers them too."""
    longer = None if mask is None else torch.cat([mask, torch.ones(rows, columns, dtype=torch.long)], dim=1)
    return tiny.ids(rows, columns, seed), longer


@pytest.mark.parametrize(
    ("net", "passes"),
    [
        pytest.param(
            sharing, passes, id=f"{passes}-gqa{sharing}", marks=() if sharing == 4 or passes == 7 else pytest.mark.slow
        )
        for sharing in (1, 4, 7)
        for passes in (1, 7, 64)
    ],
    indirect=["net"],
)
def test_one_shot_equals_passes(net, method, batch, passes):
    tokens, mask = batch
    whole, parts = tiny.cache(net, method), tiny.cache(net, method)
    for cache in (whole, parts):
        # A method that drops tokens has to know that the passes are one prompt.
        cache.expect(COLUMNS)
    expected = tiny.feed(net, whole, tokens, mask)
    got = tiny.feed(net, parts, tokens, mask, passes)
    if not str(method).startswith(PASSES_MATTER) or "window=500" in method:
        same(got, expected, mask)
    else:
        # Of the row without padding.
        assert not torch.allclose(got[1], expected[1], atol=1e-3)
    assert all(held(parts, layer) == held(whole, layer) for layer in range(2))


def test_crop_then_continue_equals_never_had_them(net, method, batch):
    tokens, mask = batch
    cropped, fresh = tiny.cache(net, method), tiny.cache(net, method)
    cropped.activate_past_recording()
    tiny.feed(net, cropped, tokens, mask)
    cropped.crop(-40)
    kept = COLUMNS - 40
    tiny.feed(net, fresh, tokens[:, :kept], cut(mask, kept))
    assert cropped.get_seq_length() == kept
    for cache in (cropped, fresh):
        # Otherwise, where a rollback may follow, so few tokens are taken for drafts.
        cache.expect(20)
    extra, longer = more(3, cut(mask, kept), 20)
    same(tiny.feed(net, cropped, extra, longer), tiny.feed(net, fresh, extra, longer), longer)
    for layer in range(2):
        assert held(cropped, layer) == held(fresh, layer)


def held(cache: Any, layer: int) -> list[list[int]]:
    """Positions that stay once recording ends, per lane."""
    for each in cache.layers:
        # All of them: what a later layer has seen may change what an earlier one keeps.
        each.record_past = False
        for part in each.layer.parts:
            drop(part)
    return [lane.tolist() for row in cache.positions(layer) for lane in row]


def test_is_croppable_is_true_only_if_crop_works(net, method, batch):
    tokens, mask = batch
    cache = tiny.cache(net, method)
    tiny.feed(net, cache, tokens, mask)
    dropped = sum(layer.dropped for layer in cache.report().layers)
    adds_up = cache.method.keep.offers.adds_up or cache.method.read.offers.adds_up
    if cache.is_croppable or (dropped == 0 and not adds_up):
        cache.crop(-40)
        assert cache.get_seq_length() == COLUMNS - 40
        return
    what = "dropped tokens" if dropped else "added up attention"
    with pytest.raises(CropError, match=rf"{re.escape(cache.method.spec)} has {what}.*activate_past_recording"):
        cache.crop(-1)
    assert cache.get_seq_length() == COLUMNS


def test_a_crop_deeper_than_the_recording_is_refused_or_right(net, method, batch):
    tokens, mask = batch
    cache = tiny.cache(net, method)
    tiny.feed(net, cache, tokens[:, :60], cut(mask, 60))
    cache.activate_past_recording()
    tiny.feed(net, cache, tokens[:, 60:], mask)
    held = stored(cache) if method in STAYS_ENCODED else []
    try:
        cache.crop(-30)
    except CropError:
        return
    if method in STAYS_ENCODED:
        assert all(segment.encoded(row) == len(segment.positions(row)[0]) for segment, row in every(cache) if row != 2)
        for mine, before in zip(stored(cache), held, strict=True):
            assert torch.equal(mine, before[:, : mine.shape[1]])
        return
    fresh = tiny.cache(net, method)
    tiny.feed(net, fresh, tokens[:, :40], cut(mask, 40))
    if str(method).startswith(PROMPTS_ALONE):
        fresh.activate_past_recording()
    extra, longer = more(3, cut(mask, 40))
    got = tiny.feed(net, cache, extra, longer)
    if cache.method.store.needs.lasting and method != METHODS["kivi-all"]:
        # More of the tokens that are left is encoded than if the others had never been there.
        assert bool(got.isfinite().all())
        assert cache.get_seq_length() == 43
        return
    same(got, tiny.feed(net, fresh, extra, longer), longer)


def every(cache: Any) -> list[tuple[Any, int]]:
    """Segments and rows."""
    return [(layer.segment, row) for layer in cache.managed for row in range(layer.sequences)]


def stored(cache: Any) -> list[Tensor]:
    """Keys, and values, that every sequence holds in every layer, [h, n, d]."""
    held = [segment.decode([row], 0, segment.length(row)) for segment, row in every(cache)]
    return [part[0].clone() for pair in held for part in pair]


def test_cropping_nothing_changes_nothing(net, method, batch):
    tokens, mask = batch
    cache, other = tiny.cache(net, method), tiny.cache(net, method)
    for each in (cache, other):
        tiny.feed(net, each, tokens, mask)
    cache.crop(0)
    extra, longer = more(3, mask)
    same(tiny.feed(net, cache, extra, longer), tiny.feed(net, other, extra, longer), longer)


def test_cropping_everything_leaves_an_empty_cache(net, method, batch):
    tokens, mask = batch
    cache = tiny.cache(net, method)
    cache.activate_past_recording()
    tiny.feed(net, cache, tokens, mask)
    cache.crop(-COLUMNS)
    assert cache.get_seq_length() == 0
    again = tiny.feed(net, cache, tokens, mask)
    same(again, tiny.feed(net, tiny.cache(net, method), tokens, mask), mask)


@pytest.mark.parametrize("order", [[1, 2, 0], [2, 2, 0], [1, 1, 1]], ids=str)
def test_reorder_gives_each_row_the_history_it_asked_for(net, method, batch, order):
    tokens, mask = batch
    cache, fresh = tiny.cache(net, method), tiny.cache(net, method)
    tiny.feed(net, cache, tokens, mask)
    cache.reorder_cache(torch.tensor(order))
    mask = None if mask is None else mask[order]
    tiny.feed(net, fresh, tokens[order], mask)
    extra, longer = more(3, mask, 5)
    same(tiny.feed(net, cache, extra, longer, 1), tiny.feed(net, fresh, extra, longer, 1))


def test_reordering_again_and_again_while_decoding_stays_right(net, method, batch):
    tokens, mask = batch
    cache = tiny.cache(net, method)
    tiny.feed(net, cache, tokens, mask)
    history = tokens
    for step, order in enumerate([[0, 0, 1], [2, 1, 0], [1, 1, 1], [0, 2, 2]]):
        cache.reorder_cache(torch.tensor(order))
        extra, longer = more(3, None if mask is None else mask[order], 1, seed=step)
        last = tiny.feed(net, cache, extra, longer)
        history, mask = torch.cat([history[order], extra], dim=1), longer
    fresh = tiny.cache(net, method)
    tiny.feed(net, fresh, history[:, :COLUMNS], cut(mask, COLUMNS))
    same(last, tiny.feed(net, fresh, history[:, COLUMNS:], mask, 1)[:, -1:])


def test_repeat_interleave_really_changes_the_batch(net, method, batch):
    tokens, mask = batch
    cache, fresh = tiny.cache(net, method), tiny.cache(net, method)
    tiny.feed(net, cache, tokens, mask)
    before = cache.batch_size
    cache.batch_repeat_interleave(2)
    assert (before, cache.batch_size) == (3, 6)
    mask = None if mask is None else mask.repeat_interleave(2, 0)
    tiny.feed(net, fresh, tokens.repeat_interleave(2, 0), mask)
    extra, longer = more(6, mask)
    same(tiny.feed(net, cache, extra, longer), tiny.feed(net, fresh, extra, longer))


@pytest.mark.parametrize("rows", [torch.tensor([2, 0]), torch.tensor([False, True, True])], ids=["numbers", "mask"])
def test_select_indices_keeps_those_rows(net, method, batch, rows):
    tokens, mask = batch
    cache, fresh = tiny.cache(net, method), tiny.cache(net, method)
    tiny.feed(net, cache, tokens, mask)
    cache.batch_select_indices(rows)
    assert cache.batch_size == 2
    mask = None if mask is None else mask[rows]
    tiny.feed(net, fresh, tokens[rows], mask)
    extra, longer = more(2, mask)
    same(tiny.feed(net, cache, extra, longer), tiny.feed(net, fresh, extra, longer))


def test_reset_then_reuse_equals_a_new_cache(net, method, batch):
    tokens, mask = batch
    cache = tiny.cache(net, method)
    cache.expect(200)
    tiny.feed(net, cache, tiny.ids(2, 33, seed=5))
    cache.reset()
    assert cache.get_seq_length() == 0
    again = tiny.feed(net, cache, tokens, mask)
    same(again, tiny.feed(net, tiny.cache(net, method), tokens, mask), mask)


def test_a_deep_copy_diverges_without_touching_its_original(net, method, batch):
    tokens, mask = batch
    cache = tiny.cache(net, method)
    tiny.feed(net, cache, tokens, mask)
    clone = copy.deepcopy(cache)
    one, longer = more(3, mask, 4, seed=1)
    two, _ = more(3, mask, 4, seed=2)
    got = tiny.feed(net, clone, two, longer), tiny.feed(net, cache, one, longer)
    for logits, extra in zip(got, (two, one), strict=True):
        fresh = tiny.cache(net, method)
        tiny.feed(net, fresh, tokens, mask)
        same(logits, tiny.feed(net, fresh, extra, longer))


def test_a_saved_cache_goes_on_as_it_would_have(net, method, batch, tmp_path):
    tokens, mask = batch
    cache = tiny.cache(net, method)
    cache.expect(COLUMNS + 2)
    for start, stop in ((0, 67), (67, COLUMNS)):
        tiny.feed(net, cache, tokens[:, start:stop], cut(mask, stop))
        # In the middle of what a prompt ends with, and at its end.
        cache, saved = reloaded(net, cache, tmp_path), cache
        rest, longer = more(3, cut(mask, stop), 9)
        each = (
            tiny.feed(net, copy.deepcopy(cache), rest, longer, 1),
            tiny.feed(net, copy.deepcopy(saved), rest, longer, 1),
        )
        assert torch.equal(*each)
    extra, mask = more(3, mask, 9)
    for each in (cache, saved):
        tiny.feed(net, each, extra, mask)
        tiny.feed(net, each, *more(3, mask, 4), passes=1)
        each.reorder_cache(torch.tensor([2, 0, 0]))
    # While drafts may still be rolled back, with sequences that share what they hold.
    mask = None if mask is None else more(3, mask, 4)[1][[2, 0, 0]]
    drafts, longer = more(3, mask, 5)
    for each in (cache, saved):
        each.activate_past_recording()
        tiny.feed(net, each, drafts, longer)
    cache = reloaded(net, cache, tmp_path)
    for each in (cache, saved):
        each.crop(-3)
    extra, mask = more(3, None if longer is None else longer[:, :-3], 7)
    assert torch.equal(tiny.feed(net, cache, extra, mask, 1), tiny.feed(net, saved, extra, mask, 1))
    for layer in range(2):
        assert [lane.tolist() for row in cache.positions(layer) for lane in row] == [
            lane.tolist() for row in saved.positions(layer) for lane in row
        ]
    assert cache.report().to_dict()["layers"][0]["tokens_seen"] == saved.get_seq_length()


def test_what_a_cache_holds_is_copied_and_pickled_and_compared_bit_by_bit(net, method, tmp_path):
    cache = tiny.cache(net, method)
    tiny.feed(net, cache, tiny.ids(2, COLUMNS))
    tiny.feed(net, cache, *more(2, None, 2), passes=1)
    others = [copy.deepcopy(cache), pickle.loads(pickle.dumps((net, cache)))[1], reloaded(net, cache, tmp_path)]
    # A pickle brings a model of its own.
    others[1]._model = cache._model
    assert all(cache.equals(other) and other.equals(cache) for other in others)
    tiny.feed(net, cache, *more(2, None, 1))
    assert not any(cache.equals(other) for other in others)


def reloaded(net: PreTrainedModel, cache: Any, folder: Path) -> Any:
    cache.save(folder / "cache.kv")
    return kvote.Cache.load(folder / "cache.kv", net)


def test_a_cache_filled_in_inference_mode_goes_on_outside_it(net, method, batch):
    tokens, mask = batch
    cache, fresh = tiny.cache(net, method), tiny.cache(net, method)
    with torch.inference_mode():
        tiny.feed(net, cache, tokens, mask, 60)
    tiny.feed(net, fresh, tokens, mask, 60)
    extra, longer = more(3, mask)
    same(tiny.feed(net, cache, extra, longer), tiny.feed(net, fresh, extra, longer))
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    tiny.feed(net, cache, *more(3, None if longer is None else longer[[1, 1, 0]]))


@SHARING
def test_a_row_alone_equals_the_row_in_a_padded_batch(net, method):
    pads = [11, 0, 66]
    tokens, mask = tiny.padded(3, COLUMNS, pads)
    cache = tiny.cache(net, method)
    extra, longer = more(3, mask)
    together = torch.cat([tiny.feed(net, cache, tokens, mask), tiny.feed(net, cache, extra, longer, 1)], dim=1)
    for row, count in enumerate(pads):
        alone = tiny.cache(net, method)
        logits = tiny.feed(net, alone, tokens[row : row + 1, count:])
        logits = torch.cat([logits, tiny.feed(net, alone, extra[row : row + 1], passes=1)], dim=1)
        same(together[row : row + 1, count:], logits)
        assert all(torch.equal(a, b) for a, b in zip(cache.positions(1)[row], alone.positions(1)[0], strict=True))


def test_pads_never_enter_a_lane(net, method):
    pads = [11, 0, 66]
    tokens, mask = tiny.padded(3, COLUMNS, pads)
    cache = tiny.cache(net, method)
    assert bool(tiny.feed(net, cache, tokens, mask, 64).isfinite().all())
    for layer in range(2):
        for count, lanes in zip(pads, cache.positions(layer), strict=True):
            judges = cache.managed[layer].record.memory is not None or not getattr(cache.method.keep, "sinks", 1)
            by_score = judges and cache.report().layers[layer].dropped
            assert by_score or all(lane[0] == 0 for lane in lanes)
            assert all(lane[0] >= 0 and lane[-1] == COLUMNS - count - 1 for lane in lanes)
            assert all(len(lane) <= COLUMNS - count and bool((lane.diff() > 0).all()) for lane in lanes)


def test_lengths_are_those_of_the_columns_seen(net, method, batch):
    tokens, mask = batch
    cache = tiny.cache(net, method)
    assert cache.get_seq_length() == 0
    for stop in (7, 8, COLUMNS):
        seen = cache.get_seq_length()
        tiny.feed(net, cache, tokens[:, seen:stop], cut(mask, stop))
        for layer in range(2):
            assert cache.get_seq_length(layer) == stop
            assert cache.get_mask_sizes(4, layer) == (stop + 4, 0)
    assert cache.get_max_length() == -1


def test_nbytes_is_the_sum_of_the_buffers(net, method, batch):
    tokens, mask = batch
    cache = tiny.cache(net, method)
    tiny.feed(net, cache, tokens, mask)
    tiny.feed(net, cache, *more(3, mask))
    pools = [pool for layer in cache.managed for pool in pools_of(layer.segment)]
    runs = sum(len(lane.runs) for pool in pools for lane in pool.lanes)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in buffers(cache)}
    arrays = sum(pool.owners.nbytes for pool in pools)
    segments = [part.segment for layer in cache.managed for part in layer.parts]
    disks = [segment.disk for segment in segments if isinstance(segment, OffloadedSegment)]
    handles = sum(disk_region.HANDLE * len(blocks) for disk in disks for blocks in disk.blocks)
    assert cache.nbytes() == sum(storages.values()) + arrays + 16 * runs + handles > 0
    shared = {id(layer.rope): layer.rope.nbytes for layer in cache.managed if layer.rope is not None}
    assert cache.nbytes() == sum(layer.nbytes for layer in cache.report().layers) + sum(shared.values())


def pools_of(segment: Any) -> list[Any]:
    segment = getattr(segment, "tail", segment)
    return segment.pools if hasattr(segment, "pools") else [segment.pool]


def buffers(held: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that hangs on an object, but not on the model's own modules."""
    seen = set() if seen is None else seen
    if id(held) in seen or isinstance(held, torch.nn.Module | ModuleType | type | np.ndarray) or callable(held):
        return
    seen.add(id(held))
    if isinstance(held, Tensor):
        yield held
        return
    inside = held.values() if isinstance(held, dict) else held if isinstance(held, list | tuple) else ()
    for value in (*inside, *getattr(held, "__dict__", {}).values()):
        yield from buffers(value, seen)


def test_nbytes_falls_when_the_batch_shrinks(net, method, batch):
    tokens, mask = batch
    cache = tiny.cache(net, method)
    tiny.feed(net, cache, tokens.repeat(4, 1), None if mask is None else mask.repeat(4, 1))
    before = cache.nbytes()
    cache.batch_select_indices(torch.tensor([1]))
    tiny.feed(net, cache, *more(1, None if mask is None else mask[1:2]))
    assert cache.nbytes() < before / 2


def test_layers_that_share_a_budget_pack_a_token_once(net):
    """Packed and taken apart again for every later layer, keys would be rounded twice in all layers but the last."""
    cascade = "cake(budget=48, window=6, per_head=False, evict_generated=False) | kivi(residual=32)"
    cache, tokens = tiny.cache(net, cascade), tiny.ids(1, 200)
    tiny.feed(net, cache, tokens)
    dense = tiny.cache(net, "dense")
    tiny.feed(net, dense, tokens)
    for layer, whole in zip(cache.managed, dense.managed, strict=True):
        assert layer.segment.keys.length(0) == layer.segment.length(0) // 32 * 32 > 0
        n = layer.segment.length(0)
        kept = layer.segment.positions(0)[0].long()
        exact = whole.segment.decode([0], 0, 200)[0][:, :, kept]
        once = parse("kivi(residual=32)").store.new_segment(2, exact, 16, None)
        once.add_sequences(1)
        once.append([0], exact, exact, kept[None])
        once.compress(0)
        torch.testing.assert_close(layer.segment.decode([0], 0, n)[0], once.decode([0], 0, n)[0])
