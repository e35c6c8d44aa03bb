"""Double Sparsity: the proofs of its card (arXiv 2408.07092)."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import masking
import pytest
import tiny
import torch
from calibrated import channels, double_sparsity
from masking import decoded, model, top
from torch import Tensor
from transformers import AutoModelForCausalLM

import kvote
from kvote import InputError, MethodError
from kvote.calibration import save
from kvote.calibration.channels import ChannelProducts, order_of
from kvote.calibration.measure import measure_channels
from kvote.heads import HeadGroup
from kvote.index.labels import LabelIndex
from kvote.methods import doublesparsity
from kvote.models import embedded, world
from kvote.read.reader import Activity, ReaderDefaults, Reading, everything
from kvote.spec import parse
from kvote.store.uncompressed import UncompressedSegment
from kvote.tokens import Queries, Span

PROMPT, STEPS, K = 60, 6, 9
run = partial(masking.run, prompt=PROMPT, steps=STEPS)


def published(order: dict[int, Any], r: int, dense_layers: int) -> Any:
    """The published rule: top-k by the products of the first r channels; here they are chosen per key head."""

    def mask(layer: int, logits: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
        if layer < dense_layers:
            return None
        heads = torch.tensor(order[layer])[:, :r]
        heads = heads.repeat_interleave(query.shape[1] // len(heads), dim=0)[None, :, None]
        query, key = (x.gather(3, heads.expand(len(x), -1, x.shape[2], -1)) for x in (query, key))
        return top(query @ key.transpose(-1, -2) / r**0.5, K)

    return mask


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("dense_layers", [0, 2])
def test_logits_are_those_of_the_published_mask(groups, share, dense_layers):
    """However bad the labels are, what is read is attended exactly."""
    net, r = model(groups), round(16 * share)
    rule = published(order_of(channels(net)), r, dense_layers)
    expected = decoded(net, tiny.ids(2, PROMPT + STEPS), PROMPT, rule)
    _, got = run(net, double_sparsity(top_k=K, share=share, dense_layers=dense_layers))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(run(net, "dense")[1], expected, atol=1e-2, rtol=1e-2)


def test_all_channels_choose_the_tokens_with_the_largest_logits():
    net = model()
    expected = decoded(net, tiny.ids(2, PROMPT + STEPS), PROMPT, lambda layer, logits, *_: top(logits, K))
    _, got = run(net, double_sparsity(top_k=K, share=1.0, dense_layers=0))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    # A quarter of them chooses others.
    _, few = run(net, double_sparsity(top_k=K, share=0.25, dense_layers=0))
    assert not torch.allclose(few, expected, atol=1e-2, rtol=1e-2)


def test_a_budget_that_covers_everything_is_dense_attention_bit_by_bit():
    net = model()
    method = double_sparsity(top_k=PROMPT + STEPS, dense_layers=0)
    assert torch.equal(run(net, method)[1], run(net, "dense")[1])


def test_the_report_says_where_it_acted():
    layers = run(model(), double_sparsity(top_k=K))[0].report().layers
    assert [layer.selections for layer in layers] == [0, 0, 2 * STEPS, 2 * STEPS]
    assert [layer.tokens_read for layer in layers] == [66, 66, K, K]
    assert all(layer.tokens_held == 2 * 66 for layer in layers)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_labels_lie_beside_the_keys_and_are_counted(share):
    net = model()
    dense, labelled = (run(net, m)[0] for m in ("dense", double_sparsity(top_k=K, share=share)))
    for plain, layer in zip(dense.managed, labelled.managed, strict=True):
        if layer.index < 2:
            assert layer.nbytes == plain.nbytes
            continue
        r, slots = round(16 * share), 64 * len(layer.segment.pool.owners)
        # Per key head and token r float32 numbers more; and which channels they are, for two key heads.
        assert layer.segment.pool.parts["labels"].untyped_storage().nbytes() == slots * r * 4
        assert layer.nbytes - plain.nbytes == slots * r * 4 + 2 * r * 8


def read_by_labels(query: Tensor, key: Tensor, order: Tensor, k: int) -> Tensor:
    """The tokens [heads, k] that the labels choose for one query."""
    segment = UncompressedSegment(key.shape[1], key, key.shape[3], None)
    segment.add_sequences(1)
    segment.append([0], key, key, torch.arange(key.shape[2])[None])
    segment.add_index(LabelIndex({0: order.tolist()}), 0)
    return segment.indexes["labels"].scores(query, [0], 0, key.shape[2])[0, 0].topk(k).indices


def recall(query: Tensor, key: Tensor, order: Tensor, k: int) -> float:
    """The share of the true top k that the labels choose, over all heads."""
    true = (query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2))[0, :, 0].topk(k).indices
    chosen = read_by_labels(query, key, order, k)
    return sum(len(set(a) & set(b)) for a, b in zip(true.tolist(), chosen.tolist(), strict=True)) / true.numel()


def test_channels_that_matter_are_found_and_find_the_tokens():
    """Keys with planted outlier channels: an eighth of the channels, calibrated or drawn by lot."""
    torch.manual_seed(5)
    key, query = torch.randn(1, 2, 800, 64), torch.randn(1, 8, 800, 64)
    planted = [torch.randperm(64)[:8] for _ in range(2)]
    for head, own in enumerate(planted):
        key[:, head, :, own] *= 6
    segment = UncompressedSegment(2, key, 64, None)
    segment.add_sequences(1)
    segment.append([0], key, key, torch.arange(800)[None])
    reader = ChannelProducts()
    list(reader.read(Reading(Queries(query), segment, [0], 0, 0, False, 0, 1, None, Activity())))
    order = torch.tensor(reader.data(800)["layers"]["0"])
    assert all(set(found[:8].tolist()) == set(own.tolist()) for found, own in zip(order, planted, strict=True))
    last, lot = query[:, :, -1:], torch.stack([torch.randperm(64)[:8] for _ in range(2)])
    assert recall(last, key, order[:, :8], 40) > 0.6
    assert recall(last, key, lot, 40) < 0.3


@dataclass(frozen=True)
class Watching(ReaderDefaults):
    """Reads everything and notes the last query of each layer."""

    queries: dict[int, Tensor]

    def read(self, reading: Reading) -> Iterator[Span]:
        self.queries[reading.layer] = reading.queries.rotated[:, :, -1:]
        yield everything(reading)


def test_calibrated_channels_beat_channels_drawn_by_lot_on_a_trained_model():
    net = AutoModelForCausalLM.from_pretrained(embedded(), dtype=torch.float32).eval()

    def text(seed: int, tokens: int) -> Tensor:
        made = world.sample("needle", tokens, seed)
        asked = f"{made.document} {made.questions[0].prompt}"
        for mark in world.GLUED:
            asked = asked.replace(mark, f" {mark} ")
        return torch.from_numpy(world.encode(asked))[None]

    order = order_of(measure_channels(net, [text(seed, 400) for seed in range(100, 104)]))
    queries: dict[int, Tensor] = {}
    cache = kvote.Cache(net, kvote.Method("watching", read=Watching(queries)))
    with torch.inference_mode():
        net(input_ids=text(7, 900), past_key_values=cache)
    better = []
    for layer in cache.managed:
        n = layer.segment.length(0)
        key, query = layer.segment.decode([0], 0, n)[0], queries[layer.index]
        found = torch.tensor(order[layer.index])[:, :8]
        random_worth = [torch.stack([torch.randperm(32)[:8] for _ in range(2)]) for _ in range(5)]
        drawn = sum(recall(query, key, lot, 64) for lot in random_worth) / 5
        better.append((recall(query, key, found, 64), drawn))
    assert all(mine > drawn for mine, drawn in better), better
    mine, drawn = (sum(x) / len(better) for x in zip(*better, strict=True))
    assert mine > drawn + 0.15, better


def test_prompts_turns_and_announced_tokens_are_read_whole():
    net = model()
    cache, tokens = tiny.cache(net, double_sparsity(top_k=K)), tiny.ids(1, 75)
    cache.expect(50)
    passes = tiny.feed(net, cache, tokens[:, :50], passes=1)
    torch.testing.assert_close(passes, tiny.feed(net, tiny.cache(net), tokens[:, :50]), atol=1e-4, rtol=1e-4)
    tiny.feed(net, cache, tokens[:, 50:70])
    assert all(layer.selections == 0 for layer in cache.report().layers)
    tiny.feed(net, cache, tokens[:, 70:], passes=1)
    assert [layer.selections for layer in cache.report().layers] == [0, 0, 5, 5]


def test_it_reads_a_few_of_what_another_method_keeps():
    net = model()
    cache, _ = run(net, lambda net: parse("snapkv(budget=30, window=6)") | double_sparsity(top_k=K)(net))
    layer = cache.report().layers[3]
    assert layer.dropped == 2 * (PROMPT - 30)
    assert layer.tokens_held == 2 * (30 + STEPS)
    assert layer.tokens_read == K
    assert layer.selections == 2 * STEPS


def test_a_calibration_that_lacks_heads_is_refused():
    net = model()
    cache = tiny.cache(net, double_sparsity(top_k=K))
    group = HeadGroup((1,), cache.managed[2])
    attend = cache.managed[2].attend
    cache.managed[2].attend = lambda step: attend(group.step(step))  # type: ignore[method-assign]
    with pytest.raises(MethodError, match="knows 2 key heads of layer 2, which has 1"):
        tiny.feed(net, cache, tiny.ids(1, 20))


def test_without_a_calibration_it_says_how_to_make_one():
    with pytest.raises(MethodError, match=r"run `kvote calibrate --model MODEL --what channels --out FILE` once"):
        parse("doublesparsity")


def test_a_file_serves_the_model_it_was_made_for_and_no_other(tmp_path):
    net, path = model(), tmp_path / "channels.json"
    save(channels(net), path)
    spec = f"doublesparsity(channels={str(path)!r}, top_k={K})"
    assert parse(spec).spec == spec
    assert torch.equal(run(net, spec)[1], run(net, double_sparsity(top_k=K))[1])
    both = f"h2o(budget=50) | {spec}"
    for method in (spec, both):
        with pytest.raises(InputError, match=r"channels.json was made for another model \(heads 4 is 8 here\)"):
            tiny.cache(model(groups=4), method)


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"top_k": 0}, "top_k must be a whole number of at least 1; got 0"),
        ({"dense_layers": -1}, "dense_layers must be a whole number of at least 0; got -1"),
        ({"share": 0}, "share must be a share of the channels, above 0 and at most 1; got 0"),
        ({"share": 1.5}, "share must be a share of the channels, above 0 and at most 1; got 1.5"),
        ({"share": "half"}, "share must be a share of the channels, above 0 and at most 1; got 'half'"),
        ({"channels": 7}, "channels must be the name of a file; got 7"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters, sentence):
    with pytest.raises(MethodError, match=sentence):
        doublesparsity(**{"channels": channels(model()), **parameters})
