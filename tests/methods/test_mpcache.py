"""MPCache: the proofs of its card (arXiv 2501.06807)."""

from functools import partial
from typing import Any

import masking
import pytest
import tiny
import torch
from masking import decoded
from torch import Tensor

from kvote import MethodError
from kvote.index.bounds import BoundsIndex
from kvote.keep.score.any_query import AnyQuery
from kvote.method import Method
from kvote.methods import mpcache
from kvote.needs import KeeperOffers, Needs
from kvote.read import best_clusters
from kvote.read.best_clusters import BestClusters

PROMPT, STEPS, BUDGET, CLUSTER = 86, 6, 50, 4
SPEC = f"budget={BUDGET}, cluster={CLUSTER}, fine=0.3"
PAIRS = f"mpcache({SPEC}, share=2)"
run = partial(masking.run, prompt=PROMPT, steps=STEPS)


def looked_at(net: Any, tokens: Tensor, share: float = 0.2, scale: float | None = None) -> list[Tensor]:
    """By layer, the most attention [b, n] that any of the last queries of a prompt gives each token, head by head."""
    net.set_attn_implementation("eager")
    with torch.no_grad():
        attention = net(input_ids=tokens, output_attentions=True).attentions
    net.set_attn_implementation("sdpa")
    last = int(share * tokens.shape[1])
    found = [layer[:, :, -last:] for layer in attention]
    if scale is not None:
        found = [(each.log() / scale).softmax(-1) for each in found]
    return [sum(each[:, i] for i in range(each.shape[1])).div(each.shape[1]).amax(1) for each in found]


def survivors(worth: list[Tensor], share: int, budget: int = BUDGET) -> list[list[list[int]]]:
    """By layer and sequence, the tokens of a prompt that stay: the newest, and those of the largest worth."""
    return [
        [[*sorted(row[:-1].topk(budget - 1).indices.tolist()), len(row) - 1] for row in worth[layer - layer % share]]
        for layer in range(len(worth))
    ]


def clusters(query: Tensor, key: Tensor, coarse: float, fine: float, alpha: float) -> set[int]:
    """The places among the keys [n, d] that ``query`` [d] reads, as the code has it, but for what is forced."""
    n, size = len(key), CLUSTER

    def similar(rows: list[int]) -> float:
        part = key[rows]
        return float(query @ (alpha * part.amax(0) + (1 - alpha) * part.amin(0)))

    wide, narrow = ([list(range(n))[i : i + step] for i in range(0, n, step)] for step in (2 * size, size))
    open_end = n % (2 * size) > 0
    forced = {0, len(wide) - 1} if open_end else {0}
    rest = sorted(set(range(len(wide))) - forced, key=lambda i: -similar(wide[i]))
    pairs = forced | set(rest[: int(coarse * len(wide))])
    children = [i for i in range(len(narrow)) if i // 2 in pairs]
    forced = {0, len(narrow) - 1} if open_end else {0}
    rest = sorted(set(children) - forced, key=lambda i: -similar(narrow[i]))
    return {t for i in forced | set(rest[: int(fine * len(narrow))]) for t in narrow[i]}


def published(
    stay: list[list[list[int]]], share: int, coarse: float = 0.5, fine: float = 0.3, alpha: float = 0.6
) -> Any:
    """The rule as a mask over the whole text."""
    held: dict[str, Tensor] = {}

    def mask(layer: int, logits: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if layer % share:
            return held["mask"]
        n = key.shape[2]
        seen = torch.zeros(logits.shape, dtype=torch.bool)
        for row, prompt in enumerate(stay[layer]):
            places = torch.tensor(prompt + list(range(PROMPT, n)))
            for head in range(query.shape[1]):
                best = clusters(query[row, head, 0], key[row, head, places], coarse, fine, alpha)
                seen[row, head, 0, places[sorted(best)]] = True
        held["mask"] = seen
        return seen

    return mask


@pytest.mark.parametrize(("groups", "share"), [(1, 1), (2, 2), (2, 1), (4, 3)])
def test_logits_are_those_of_the_published_mask(groups, share):
    net, tokens = masking.model(groups), tiny.ids(2, PROMPT + STEPS)
    stay = survivors(looked_at(net, tokens[:, :PROMPT]), share)
    cache, got = run(net, f"mpcache({SPEC}, share={share})")
    for layer, sequences in zip(cache.managed, stay, strict=True):
        for row, prompt in enumerate(sequences):
            for positions in layer.segment.positions(row):
                assert positions.tolist() == prompt + list(range(PROMPT, PROMPT + STEPS))
    torch.testing.assert_close(got, decoded(net, tokens, PROMPT, published(stay, share)), atol=1e-4, rtol=1e-4)


OTHERS: dict[str, dict[str, Any]] = {
    "one level": {"coarse": 1.0},
    "bounds from above alone": {"alpha": 1.0},
    "fewer clusters": {"fine": 0.2},
    "each layer for itself": {"share": 1},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_rules_read_other_clusters(other):
    net, tokens = masking.model(2), tiny.ids(2, PROMPT + STEPS)
    share = other.pop("share", 2)
    expected = decoded(net, tokens, PROMPT, published(survivors(looked_at(net, tokens[:, :PROMPT]), 2), share, **other))
    assert not torch.allclose(run(net, PAIRS)[1], expected, atol=1e-2, rtol=1e-2)


def test_no_threshold_and_whole_ratios_are_dense_attention_bit_by_bit():
    net = masking.model()
    cache, got = run(net, "mpcache(budget=1.0, coarse=1.0, fine=1.0)")
    assert torch.equal(got, run(net, "dense")[1])
    assert all(layer.dropped == layer.selections == layer.reused == 0 for layer in cache.report().layers)


def test_scores_are_linear_in_the_query_and_bounds_are_not():
    torch.manual_seed(0)
    reader = mpcache().read
    assert isinstance(reader, BestClusters)
    low, high = torch.randn(2, 1, 2, 9, 16).sort(dim=0).values
    one, other = torch.randn(2, 1, 4, 1, 16)
    together = reader.similar(one, low, high) + reader.similar(other, low, high)
    torch.testing.assert_close(reader.similar(one + other, low, high), together)

    def bound(query: Tensor) -> Tensor:
        return torch.maximum(query[:, :2] * low[:, :, :1], query[:, :2] * high[:, :, :1]).sum(-1)

    assert not torch.allclose(bound(one + other), bound(one) + bound(other), atol=0.1)


@pytest.mark.parametrize("n", [97, 96, 104, 101, 64, 60])
def test_clusters_chosen_are_children_of_pairs_chosen_and_the_first_is_always_there(n):
    torch.manual_seed(n)
    reader = mpcache(cluster=CLUSTER).read
    low, high = torch.randn(2, 3, 2, -(-n // CLUSTER), 16).sort(dim=0).values
    chosen, scores = reader.chosen(torch.randn(3, 4, 1, 16), low, high, n), []
    assert chosen.shape[-1] <= int(0.2 * low.shape[2]) + 2
    for clusters_of in chosen.flatten(0, 2).tolist():
        assert clusters_of[0] == 0
        assert clusters_of == sorted(set(clusters_of))
        assert n % (2 * CLUSTER) == 0 or clusters_of[-1] == low.shape[2] - 1
        scores.append({i // 2 for i in clusters_of})
    assert all(len(pairs) <= reader.counts(n)[0] for pairs in scores)


def test_few_scores_are_compared(monkeypatch):
    """Of 4,096 tokens, 128 pairs and then the clusters of half of them, and of the one that is forced."""
    compared: list[int] = []
    top_k = best_clusters.kernels.top_k
    monkeypatch.setattr(
        best_clusters.kernels, "top_k", lambda scores, k: (compared.append(scores.shape[-1]), top_k(scores, k))[1]
    )
    low, high = torch.randn(2, 1, 1, 256, 8).sort(dim=0).values
    mpcache().read.chosen(torch.randn(1, 1, 1, 8), low, high, 4096)
    assert compared == [128, 130]


def held_with(net: Any, threshold: float, share: int = 1) -> Any:
    cache = tiny.cache(net, f"mpcache(budget=1.0, threshold={threshold}, share={share})")
    tiny.feed(net, cache, tiny.ids(2, PROMPT))
    return [[[set(at.tolist()) for at in layer.segment.positions(row)] for row in (0, 1)] for layer in cache.managed]


@pytest.mark.parametrize("share", [1, 2])
def test_what_survives_shrinks_as_the_threshold_grows_and_is_the_same_for_all_heads(share):
    net = masking.model()
    worth = looked_at(net, tiny.ids(2, PROMPT))
    wider, sizes = held_with(net, 0.0, share), set()
    for threshold in (0.02, 0.05, 0.2):
        held = held_with(net, threshold, share)
        for i, (layer, before) in enumerate(zip(held, wider, strict=True)):
            for row, heads in enumerate(layer):
                assert heads[0] == heads[1] <= before[row][0]
                assert heads[0] == {*(worth[i - i % share][row] >= threshold).nonzero().flatten().tolist(), PROMPT - 1}
                sizes.add(len(heads[0]))
        assert held != wider
        wider = held
    # Layers and prompts differ in how many they keep.
    assert len(sizes) > 6


def test_weights_of_products_without_scale_are_sharper():
    net, tokens = masking.model(), tiny.ids(1, PROMPT)
    plain, sharp = looked_at(net, tokens), looked_at(net, tokens, scale=16**-0.5)
    cache = tiny.cache(net, f"mpcache({SPEC}, scaled=False)")
    tiny.feed(net, cache, tokens)
    assert survivors(plain, 1) != survivors(sharp, 1)
    for layer, (stay,) in zip(cache.managed, survivors(sharp, 1), strict=True):
        assert layer.segment.positions(0)[0].tolist() == stay


@pytest.mark.parametrize(("tokens", "share", "window"), [(20_000, 0.2, 4000), (30_000, 0.2, 3000), (3, 0.2, 1)])
def test_half_the_queries_judge_a_long_prompt(tokens, share, window):
    asked: list[tuple[int, int]] = []

    class Seen:
        prompt_left, count, first, rows = 0, tokens, 0, (0,)
        lse = torch.zeros(1, 1, tokens)

        def weights(self, start: int, stop: int) -> Tensor:
            asked.append((start, stop))
            return torch.zeros(1, 1, 1, 1)

    AnyQuery(queries=share, scaled=True).observe(Seen(), AnyQuery(queries=share, scaled=True).new_memory())
    assert (asked[0][0], asked[-1][1]) == (tokens - window, tokens)


def test_all_layers_of_a_group_read_what_its_first_chose():
    cache = run(masking.model(layers=5), f"mpcache({SPEC}, share=3)")[0]
    layers = cache.report().layers
    assert [layer.selections for layer in layers] == [2 * STEPS, 0, 0, 2 * STEPS, 0]
    assert [layer.reused for layer in layers] == [0, 2 * STEPS, 2 * STEPS, 0, 2 * STEPS]
    assert all(layer.tokens_read <= int(0.3 * -(-(BUDGET + STEPS) // CLUSTER) + 2) * CLUSTER for layer in layers)


def test_a_second_prompt_is_judged_anew_and_what_was_generated_stays_until_then():
    net, tokens = masking.model(), tiny.ids(1, 120)
    cache = tiny.cache(net, PAIRS)
    tiny.feed(net, cache, tokens[:, :60])
    tiny.feed(net, cache, tokens[:, 60:70], passes=1)
    assert [layer.segment.length(0) for layer in cache.managed] == [60] * 4
    tiny.feed(net, cache, tokens[:, 70:110])
    assert [layer.segment.length(0) for layer in cache.managed] == [BUDGET] * 4
    # Nothing of a prompt is remembered once it is cut down.
    assert all(not layer.record.memory.rows for layer in cache.managed)


def test_a_reader_of_groups_wants_a_keeper_whose_layers_are_alike_in_them():
    keeps = {n: mpcache(share=n) for n in (1, 2, 4)}
    assert keeps[4].keep.offers.layers_alike == 4
    assert keeps[2].read.needs.other_layers
    assert not keeps[1].read.needs.other_layers
    assert (Needs(layers_alike=2) | Needs(layers_alike=3)).layers_alike == 6
    assert KeeperOffers().layers_alike == 1
    # Pairs lie within fours; fours do not lie within pairs.
    Method(keep=keeps[4].keep, read=keeps[2].read)
    with pytest.raises(MethodError, match="layers do not keep the same tokens"):
        Method(keep=keeps[2].keep, read=keeps[4].read)


def test_bounds_are_those_of_the_tokens_held():
    net = masking.model()
    cache = run(net, PAIRS)[0]
    for layer in cache.managed:
        n = layer.segment.length(0)
        key = layer.segment.decode([0, 1], 0, n)[0]
        low, high = layer.segment.indexes[BoundsIndex.name].of([0, 1], n)
        for i in range(low.shape[2]):
            part = key[:, :, i * CLUSTER : (i + 1) * CLUSTER]
            assert torch.equal(low[:, :, i], part.amin(2))
            assert torch.equal(high[:, :, i], part.amax(2))


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"budget": 0}, "budget must be"),
        ({"threshold": 1.0}, "threshold must be a share of attention, from 0 to below 1; got 1.0"),
        ({"queries": 0.0}, "queries must be a share of a prompt, above 0 and at most 1; got 0.0"),
        ({"coarse": 1.5}, "coarse must be a number from 0 to 1; got 1.5"),
        ({"fine": -0.1}, "fine must be a number"),
        ({"alpha": "x"}, "alpha must be a number"),
        ({"cluster": 5}, "cluster must divide 64 tokens"),
        ({"share": 0}, "(share|layers_alike) must be a whole number of at least 1; got 0"),
        ({"scaled": 1}, "scaled must be"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters, sentence):
    with pytest.raises(MethodError, match=sentence):
        mpcache(**parameters)
