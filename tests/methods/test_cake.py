"""CAKE: the proofs of its card (arXiv 2503.12491)."""

from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from selecting import DIM, Fed
from torch import Tensor
from torch.nn.functional import avg_pool1d
from watching import weights

from kvote import MethodError, settling
from kvote.keep.allocate.shares import even, of_logs, shares
from kvote.keep.score.dispersion import Dispersion
from kvote.keep.score.votes import Moments
from kvote.layer import Layer, LayerStack
from kvote.method import Method
from kvote.needs import Needs
from kvote.spec import parse
from kvote.store.uncompressed import Uncompressed

N, BUDGET, WINDOW, LAYERS = 64, 24, 8, 4
SPEC = f"cake(budget={BUDGET}, window={WINDOW}"
TOTAL = (BUDGET - WINDOW) * LAYERS


def crew(method: str, layers: int = LAYERS, **shape: int) -> list[Fed]:
    """Layers of one cache, each fed with keys and queries of its own, the later ones less peaked."""
    made: list[Fed] = []
    together = LayerStack()
    for i in range(layers):
        fed = Fed(method, **shape)
        fed.query *= 2.0 / (i + 1)
        fed.layer = Layer(i, parse(method), fed.rope, layers, together)
        made.append(fed)
    return made


def kept(fed: Fed, row: int = 0) -> list[list[int]]:
    return [lane.tolist() for lane in fed.layer.segment.positions(row)]


@dataclass
class Slow:
    """The paper, layer by layer and head by head, in float64 and on matrices."""

    kernel: int = 5
    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0
    shared: bool = False

    def vote(self, fed: Fed, row: int) -> tuple[Decimal, Tensor]:
        """Preference of a layer, and what the tokens before the window are worth [h, n]."""
        query, key = (fed.rotated(x, 0, N)[row : row + 1].double() for x in (fed.query, fed.key))
        seen = weights(query, key, DIM**-0.5)[0, :, -WINDOW:, :-WINDOW]
        entropy = -(seen * (seen + 1e-10).log()).sum().item()
        shift = seen.var(dim=1).sum().item()
        # Decimals neither over- nor underflow.
        preference = Decimal(entropy) ** Decimal(1 / self.tau1) * Decimal(shift) ** Decimal(1 / self.tau2)
        worth = []
        for head in range(fed.key.shape[1]):
            groups = fed.query.shape[1] // fed.key.shape[1]
            own = seen[head * groups : (head + 1) * groups]
            each = own.mean(1) + self.gamma * own.var(dim=1)
            worth.append(avg_pool1d(each[:, None], self.kernel, 1, self.kernel // 2)[:, 0].mean(0))
        together = torch.stack(worth)
        return preference, together.mean(0, keepdim=True).expand_as(together) if self.shared else together

    def run(self, feds: list[Fed], row: int = 0) -> list[list[list[list[int]]]]:
        """What every layer holds after each layer's pass."""
        votes = [self.vote(fed, row) for fed in feds]
        held: list[list[list[int]]] = []
        history = []
        for i in range(len(feds)):
            held.append([list(range(N - WINDOW))] * feds[i].key.shape[1])
            preferences = [preference for preference, _ in votes[: i + 1]]
            given = [int(p / sum(preferences) * TOTAL) for p in preferences]
            excess = sum(max(0, g - (N - WINDOW)) for g in given)
            given = [min(g, N - WINDOW) for g in given]
            for rest in (excess, TOTAL - sum(given) - excess):
                # One token at a time; a layer that is full is passed over.
                at = 0
                while rest > 0 and min(given) < N - WINDOW:
                    if given[at] < N - WINDOW:
                        given[at], rest = given[at] + 1, rest - 1
                    at = (at + 1) % len(given)
            for layer, count in enumerate(given):
                for head, tokens in enumerate(held[layer]):
                    worth = votes[layer][1][head]
                    held[layer][head] = sorted(sorted(tokens, key=lambda t: -worth[t].item())[:count])
            history.append([[[*tokens, *range(N - WINDOW, N)] for tokens in heads] for heads in held])
        return history


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (6, 1)])
@pytest.mark.parametrize(
    "change", [{}, {"kernel": 1}, {"gamma": 0.0}, {"tau1": 0.8, "tau2": 1.3}, {"tau1": 0.05}, {"per_head": False}]
)
def test_kept_tokens_equal_the_paper_after_every_layer(heads, kv_heads, change):
    given = "".join(f", {name}={value}" for name, value in change.items())
    feds = crew(f"{SPEC}{given})", heads=heads, kv_heads=kv_heads, rows=2)
    slow = Slow(**{("shared" if k == "per_head" else k): (not v if k == "per_head" else v) for k, v in change.items()})
    expected = [slow.run(feds, row) for row in range(2)]
    for i, fed in enumerate(feds):
        fed.feed(N)
        for row in range(2):
            assert [kept(done, row) for done in feds[: i + 1]] == expected[row][i], (i, row)
    lengths = [[len(kept(fed, row)[0]) for fed in feds] for row in range(2)]
    # Layers have lengths of their own, and so have sequences.
    assert len(set(lengths[0])) > 1
    assert lengths[0] != lengths[1]
    assert all(fed.layer.activity.dropped > 0 for fed in feds)
    assert all(sum(each) <= TOTAL + LAYERS * WINDOW for each in lengths)


def test_a_layer_keeps_the_best_of_all_although_it_shrank_step_by_step():
    feds = crew(f"{SPEC})")
    sizes: list[list[int]] = [[] for _ in feds]
    for i, fed in enumerate(feds):
        fed.feed(N)
        for layer in range(i + 1):
            sizes[layer].append(len(kept(feds[layer])[0]))
    assert any(len(set(size)) > 2 for size in sizes)
    for fed, size in zip(feds, sizes, strict=True):
        assert size == sorted(size, reverse=True)
        _, worth = Slow().vote(fed, 0)
        best = worth.topk(size[-1] - WINDOW).indices.sort().values.tolist()
        assert [lane[:-WINDOW] for lane in kept(fed)] == best


def test_shares_of_what_no_cap_holds_back_never_grow_by_more_than_the_remainder():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        preferences = torch.rand(12, generator=generator).add(0.2).tolist()
        steps = [shares(preferences[:n], 1000, [10**6] * n) for n in range(1, 13)]
        for before, after in pairwise(steps):
            assert all(b <= a + 1 for a, b in zip(before, after, strict=False))


def test_shares_add_up_and_respect_caps():
    generator = torch.Generator().manual_seed(1)
    bound = 0
    for _ in range(500):
        n = int(torch.randint(1, 9, (), generator=generator))
        preferences = (torch.rand(n, generator=generator) ** 4).tolist()
        caps = torch.randint(0, 60, (n,), generator=generator).tolist()
        total = int(torch.randint(0, 300, (), generator=generator))
        given = shares(preferences, total, caps)
        assert sum(given) == min(total, sum(caps))
        assert all(0 <= g <= cap for g, cap in zip(given, caps, strict=True))
        bound += any(g == cap for g, cap in zip(given, caps, strict=True)) and sum(given) == total
    assert bound > 100


@pytest.mark.parametrize(
    ("preferences", "total", "caps", "expected"),
    [
        ([1, 1, 1], 11, [9, 9, 9], [4, 4, 3]),
        ([1, 3], 10, [20, 20], [3, 7]),
        # 8 too many for the first: 4 more for each of the others, then what truncation left.
        ([8, 1, 1], 21, [8, 20, 20], [8, 7, 6]),
        ([0, 0], 6, [9, 9], [3, 3]),
        ([float("nan"), 1.0], 6, [9, 9], [3, 3]),
        ([5, 1, 1], 40, [3, 4, 50], [3, 4, 33]),
        ([1, 1], 99, [4, 5], [4, 5]),
        ([1, 1], 0, [4, 5], [0, 0]),
    ],
)
def test_shares_worked_out_by_hand(preferences, total, caps, expected):
    assert shares(preferences, total, caps) == expected


def test_preferences_neither_over_nor_underflow():
    assert of_logs([-5.0, -5.0]) == [1, 1]
    assert of_logs([40_000.0, 39_000.0, 40_000.0]) == [1, 0, 1]
    assert of_logs([-40_000.0, -39_000.0]) == [0, 1]
    assert of_logs([float("-inf"), 0.5]) == [0, 1]
    for odd in ("-inf", "inf", "nan"):
        assert of_logs([float(odd)] * 2) == [1, 1]
    assert of_logs([1.5, 0.5, -1.0]) == pytest.approx([1, 0.36788, 0.082085], rel=1e-4)


@pytest.mark.parametrize("taus", ["tau1=0.001", "tau2=0.001", "tau1=0.001, tau2=0.001", "tau1=1e30, tau2=1e30"])
def test_extreme_exponents_give_one_layer_all_or_everyone_the_same(taus):
    torch.manual_seed(0)
    feds = crew(f"{SPEC}, {taus})")
    for fed in feds:
        fed.feed(N)
    sizes = sorted(len(kept(fed)[0]) - WINDOW for fed in feds)
    # What one layer cannot hold is for the others, but for what they had dropped before.
    assert TOTAL - LAYERS <= sum(sizes) <= TOTAL
    assert sizes[-1] == (TOTAL // LAYERS if "1e30" in taus else N - WINDOW)


def test_even_parts():
    assert [even(7, 3), even(2, 4), even(0, 2)] == [[3, 2, 2], [1, 1, 0, 0], [0, 0]]


@pytest.mark.parametrize("parts", [[8], [3, 5], [1] * 8])
def test_moments_of_parts_are_those_of_the_whole(parts):
    seen = (torch.randn(4, 8, 300, generator=torch.Generator().manual_seed(0)) * 3).softmax(-1) * 1e-3
    pieces = [Moments.of(piece) for piece in seen.split(parts, dim=1)]
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    assert whole.count == 8
    torch.testing.assert_close(whole.mean, seen.mean(1))
    torch.testing.assert_close(whole.variance, seen.double().var(dim=1).float(), rtol=1e-4, atol=0)
    assert whole.entropy == pytest.approx(-float((seen * (seen + 1e-10).log()).sum()), rel=1e-5)


def test_without_variance_and_with_equal_layers_it_is_snapkv():
    feds = crew(f"{SPEC}, gamma=0.0)")
    snapkv = Fed(f"snapkv(budget={BUDGET}, window={WINDOW}, kernel=5, pooling='avg')")
    for fed in [*feds, snapkv]:
        fed.query, fed.key, fed.value = feds[0].query, feds[0].key, feds[0].value
        fed.feed(N)
    assert all(kept(fed) == kept(snapkv) for fed in feds)
    apart = crew(f"{SPEC}, gamma=200.0)", 1)[0]
    apart.query, apart.key, apart.value = feds[0].query, feds[0].key, feds[0].value
    apart.feed(N)
    assert kept(apart) != kept(snapkv)


class Peak:
    """The most tokens per key head, and bytes of tokens and what is remembered of them, that a cache held before any
    layer let go of some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Any) -> None:
        self.tokens = self.nbytes = 0
        drop = settling.drop

        def observe_queries(layer: Layer) -> None:
            self.tokens = max(self.tokens, sum(each.held for each in cache.managed))
            parts = [part for each in cache.managed for part in (each.segment, each.record.memory) if part is not None]
            self.nbytes = max(self.nbytes, sum(part.nbytes for part in parts))
            drop(layer)

        monkeypatch.setattr(settling, "drop", observe_queries)


def test_a_prompt_in_one_pass_never_holds_more_than_the_budget_and_a_layer(monkeypatch):
    layers, n, budget, window = 8, 3000, 200, 16
    net = tiny.model(num_hidden_layers=layers)
    cache, dense = tiny.cache(net, f"cake(budget={budget}, window={window})"), tiny.cache(net)
    tiny.feed(net, dense, tiny.ids(1, n))
    peak = Peak(monkeypatch, cache)
    tiny.feed(net, cache, tiny.ids(1, n))
    most = (budget - window) * layers + layers * window + n
    assert n < peak.tokens <= most
    token = dense.nbytes() / (layers * n)
    # Beside the tokens: an eighth of room, pages begun or not yet given back, and what the tokens are worth.
    assert peak.nbytes <= 1.125 * token * (most + 3 * 64 * layers) + 2 * 4 * most
    assert peak.nbytes < 0.3 * dense.nbytes()
    assert sum(layer.held for layer in cache.managed) <= budget * layers
    assert cache.nbytes() < dense.nbytes() * (budget + 3 * 64) / n


def test_an_announced_prompt_in_passes_is_held_by_all_layers_until_the_last(monkeypatch):
    layers, n = 4, 900
    net = tiny.model(num_hidden_layers=layers)
    cache = tiny.cache(net, "cake(budget=100, window=16)")
    cache.expect(n)
    peak = Peak(monkeypatch, cache)
    tiny.feed(net, cache, tiny.ids(1, n), passes=300)
    assert peak.tokens == (layers - 1) * 600 + n
    assert sum(layer.held for layer in cache.managed) <= 100 * layers


def test_layers_differ_and_positions_go_on():
    net = tiny.model(num_hidden_layers=LAYERS)
    cache, dense = tiny.cache(net, f"{SPEC})"), tiny.cache(net)
    tokens = tiny.ids(2, N)
    same = tiny.feed(net, dense, tokens)
    torch.testing.assert_close(tiny.feed(net, cache, tokens), same, atol=1e-4, rtol=1e-4)
    held = [[len(row[0]) for row in cache.positions(layer)] for layer in range(LAYERS)]
    assert len({size for sizes in held for size in sizes}) > 2
    for step in range(1, 12):
        tiny.feed(net, cache, tiny.ids(2, 1, seed=step))
        for layer in range(LAYERS):
            assert cache.get_seq_length(layer) == N + step
            for row, lanes in enumerate(cache.positions(layer)):
                # Lengths stay, and the last tokens are always there.
                assert all(len(lane) == held[layer][row] for lane in lanes)
                assert all(lane[-WINDOW:].tolist() == list(range(N + step - WINDOW, N + step)) for lane in lanes)


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("burst", [1, 3])
def test_a_generated_token_drops_what_it_looks_at_least(per_head, burst):
    feds = crew(f"{SPEC}, per_head={per_head}, burst={burst})", n=N + 30)
    for fed in feds:
        fed.feed(N)
    limits = [len(kept(fed)[0]) - WINDOW for fed in feds]
    assert sum(limits) == TOTAL
    for at in range(N, N + 30):
        for fed, limit in zip(feds, limits, strict=True):
            before = kept(fed)
            if len(before[0]) < limit + WINDOW:
                fed.feed(1)
                assert kept(fed) == [[*held, at] for held in before]
                continue
            fed.feed(1)
            query, key = (fed.rotated(x, 0, at + 1)[0].double() for x in (fed.query, fed.key))
            worth = []
            for head, held in enumerate(before):
                held = [*held, at]
                seen = [torch.softmax(key[head, held] @ query[2 * head + i, at] * DIM**-0.5, 0) for i in range(2)]
                worth.append(avg_pool1d(torch.stack(seen).mean(0)[None, : len(held) - WINDOW], 5, 1, 2)[0])
            worth = worth if per_head else [torch.stack(worth).mean(0)] * 2
            for head, held in enumerate(before):
                held = [*held, at]
                best = worth[head].topk(max(min(limit, 1), limit - burst + 1)).indices.sort().values
                assert kept(fed)[head] == [held[i] for i in best] + list(range(at + 1 - WINDOW, at + 1))
    assert all(fed.layer.activity.dropped >= 30 for fed in feds)


def test_what_a_short_prompt_leaves_is_for_what_is_generated():
    net = tiny.model(num_hidden_layers=LAYERS)
    cache = tiny.cache(net, f"{SPEC})")
    tiny.feed(net, cache, tiny.ids(1, BUDGET - 4))
    sizes = []
    for step in range(12):
        tiny.feed(net, cache, tiny.ids(1, 1, seed=step))
        sizes.append([len(cache.positions(layer)[0][0]) for layer in range(LAYERS)])
    assert sizes == [[min(BUDGET, BUDGET - 3 + step)] * LAYERS for step in range(12)]


def test_generated_tokens_can_be_left_alone():
    net = tiny.model(num_hidden_layers=LAYERS)
    cache = tiny.cache(net, f"{SPEC}, evict_generated=False)")
    tiny.feed(net, cache, tiny.ids(2, N))
    before = [[[lane.tolist() for lane in row] for row in cache.positions(layer)] for layer in range(LAYERS)]
    dropped = [layer.dropped for layer in cache.report().layers]
    tiny.feed(net, cache, tiny.ids(2, 9, seed=1), passes=1)
    for layer in range(LAYERS):
        for row, lanes in enumerate(cache.positions(layer)):
            assert [lane.tolist() for lane in lanes] == [[*held, *range(N, N + 9)] for held in before[layer][row]]
    assert [layer.dropped for layer in cache.report().layers] == dropped
    assert min(dropped) > 0


class Lasting(Uncompressed):
    """A store that cannot let go of generated tokens."""

    needs = Needs(lasting=True)


def test_only_without_it_may_the_store_be_one_that_regroups():
    store = Lasting()
    with pytest.raises(MethodError, match="dropped while generating"):
        parse(f"{SPEC})") | Method("coded", store=store)
    alone = parse(f"{SPEC}, evict_generated=False)") | Method("coded", store=store)
    assert alone.store is store
    both = f"{SPEC}, evict_generated=False, per_head=False) | tokenselect(top_k=5, sinks=2, window=6, chunk=4)"
    net = tiny.model(num_hidden_layers=LAYERS)
    cache = tiny.cache(net, both)
    tiny.generate(net, tiny.ids(2, N), cache)
    assert all(layer.dropped > 0 and layer.selections > 0 for layer in cache.report().layers)
    assert len({layer.tokens_held for layer in cache.report().layers}) > 1


def test_a_budget_that_covers_the_text_is_dense_attention():
    tokens, mask = tiny.padded(2, 40, [9, 0])
    net = tiny.model(num_hidden_layers=LAYERS)
    cache = tiny.cache(net, f"cake(budget=60, window={WINDOW})")
    got = tiny.generate(net, tokens, cache, mask)
    expected = tiny.generate(tiny.model(num_hidden_layers=LAYERS), tokens, mask=mask)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(layer.dropped == 0 for layer in cache.report().layers)


def test_a_fraction_is_one_of_the_prompt():
    net = tiny.model(num_hidden_layers=LAYERS)
    cache = tiny.cache(net, f"cake(budget=0.5, window={WINDOW})")
    tiny.feed(net, cache, tiny.ids(1, 100))
    held = [layer.held for layer in cache.managed]
    assert 0.9 * 50 * LAYERS <= sum(held) <= 50 * LAYERS
    tiny.feed(net, cache, tiny.ids(1, 20, seed=1), passes=1)
    assert [layer.held for layer in cache.managed] == held


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("each", [500_000, 1_200_000])
def test_bytes_held_fall_to_the_budget_and_use_it(rows, each):
    net, size = tiny.model(num_hidden_layers=6), rows * each
    cache = tiny.cache(net, f"cake(budget='{size}B', window={WINDOW})")
    tiny.feed(net, cache, tiny.ids(rows, 2000))
    assert len({layer.held for layer in cache.managed}) > 2
    held = [cache.nbytes()]
    for seed in range(70):
        tiny.feed(net, cache, tiny.ids(rows, 1, seed=seed))
        held.append(cache.nbytes())
    assert size / 3 < max(held) <= size


def test_the_next_turn_votes_anew():
    net = tiny.model(num_hidden_layers=LAYERS)
    cache = tiny.cache(net, f"{SPEC})")
    tiny.generate(net, tiny.ids(1, N), cache)
    before = [set(cache.positions(layer)[0][0].tolist()) for layer in range(LAYERS)]
    seen = cache.get_seq_length()
    for turn, length in enumerate((30, 3, 50)):
        tiny.feed(net, cache, tiny.ids(1, length, seed=turn))
        seen += length
        after = [cache.positions(layer)[0][0].tolist() for layer in range(LAYERS)]
        assert sum(map(len, after)) <= BUDGET * LAYERS
        for lane, old in zip(after, before, strict=True):
            assert lane[-WINDOW:] == list(range(seen - WINDOW, seen))
            assert set(lane) <= old | set(range(seen - length, seen))
        assert [set(lane) for lane in after] != before
        before = [set(lane) for lane in after]


def test_drafts_that_are_verified_leave_the_limits_as_they_were():
    net = tiny.model(num_hidden_layers=LAYERS)
    cache, plain = (tiny.cache(net, f"{SPEC})") for _ in range(2))
    cache.activate_past_recording()
    tiny.feed(net, cache, tiny.ids(1, N + 4))
    cache.crop(-4)
    tiny.feed(net, plain, tiny.ids(1, N + 4)[:, :N])
    sizes = [[len(each.positions(layer)[0][0]) for layer in range(LAYERS)] for each in (cache, plain)]
    assert sizes[0] == sizes[1]
    for seed in range(5):
        tiny.feed(net, cache, tiny.ids(1, 6, seed))
        cache.crop(-3)
        assert [len(cache.positions(layer)[0][0]) for layer in range(LAYERS)] == sizes[0]
    assert cache.get_seq_length() == N + 15


def settled(cache: Any, row: int = 0) -> list[tuple[list[int], float]]:
    """Of every layer what it holds of a sequence, and the preference it last had."""
    return [
        (cache.positions(layer)[row][0].tolist(), managed.record.memory.cast[row].preference)
        for layer, managed in enumerate(cache.managed)
    ]


# The next turn may end where the announced prompt would have, and elsewhere.
@pytest.mark.parametrize("turn", [2, 3, 4, 5, 9])
def test_a_prompt_that_is_rolled_back_leaves_nothing_to_the_next_vote(turn):
    net = tiny.model(num_hidden_layers=2)
    found = []
    for announced in (20, 40):
        cache = tiny.cache(net, "cake(budget=10, window=6)")
        cache.activate_past_recording()
        cache.expect(announced)
        tiny.feed(net, cache, tiny.ids(1, 16))
        tiny.feed(net, cache, tiny.ids(1, 2, seed=1))
        cache.crop(-2)
        assert all(not layer.record.memory.pending for layer in cache.managed)
        for layer in cache.layers:
            layer.record_past = False
        cache.expect(turn)
        tiny.feed(net, cache, tiny.ids(1, turn, seed=2))
        assert sum(layer.held for layer in cache.managed) <= 20
        found.append(settled(cache))
    assert found[0] == found[1]


@pytest.mark.parametrize("crop", [1, 2, 3, 17])
def test_a_rollback_into_an_announced_prompt_ends_it(crop):
    net = tiny.model(num_hidden_layers=2)
    cache = tiny.cache(net, "cake(budget=10, window=6)")
    cache.activate_past_recording()
    cache.expect(20)
    tiny.feed(net, cache, tiny.ids(1, 16))
    tiny.feed(net, cache, tiny.ids(1, 2, seed=1))
    cache.crop(-crop)
    assert all(not layer.record.memory.pending for layer in cache.managed)
    # What came of a pass that was cut votes; where a pass had ended, nothing voted yet.
    assert [len(layer.record.memory.cast) for layer in cache.managed] == ([0, 0] if crop == 2 else [1, 1])


def test_a_sequence_without_tokens_in_the_last_pass_leaves_nothing_to_the_next_vote():
    net = tiny.model(num_hidden_layers=2)
    cache, alone = (tiny.cache(net, "cake(budget=10, window=6)") for _ in range(2))
    tokens, mask = tiny.ids(2, 22), torch.ones(2, 22, dtype=torch.long)
    mask[1, 18:20] = 0
    for announced, start, stop in ((20, 0, 18), (0, 18, 20), (0, 20, 22)):
        if announced:
            cache.expect(announced)
        tiny.feed(net, cache, tokens[:, start:stop], mask)
    alone.expect(40)
    tiny.feed(net, alone, tokens[1:, :18])
    alone.expect(2)
    tiny.feed(net, alone, tokens[1:, 20:])
    for mine, own in zip(settled(cache, 1), settled(alone), strict=True):
        assert mine[0] == own[0]
        assert mine[1] == pytest.approx(own[1], rel=1e-4)


def test_nothing_about_a_prompt_is_remembered_but_its_limits():
    net = tiny.model(num_hidden_layers=LAYERS)
    cache = tiny.cache(net, f"{SPEC})")
    tiny.generate(net, tiny.ids(2, N), cache)
    for layer in cache.managed:
        assert layer.record.memory.nbytes == 0
        assert sorted(layer.record.memory.limits) == [0, 1]


@pytest.mark.parametrize(
    "way", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=["beams", "samples"]
)
def test_beams_and_samples_run_as_rows_of_their_own(way):
    net = tiny.model(num_hidden_layers=LAYERS)
    tokens, mask = tiny.padded(2, 40, [9, 0])
    cache = tiny.cache(net, f"{SPEC})")
    out = tiny.generate(net, tokens, cache, mask, **way)
    assert all(layer.dropped > 0 for layer in cache.report().layers)
    for row, sequence in enumerate(out.sequences if "do_sample" in way else []):
        alone = tiny.cache(net, f"{SPEC})")
        logits = [tiny.feed(net, alone, sequence[None, 9 if row < 3 else 0 : 40])[:, -1]]
        logits += [tiny.feed(net, alone, sequence[None, i : i + 1])[:, -1] for i in range(40, 47)]
        for mine, own in zip(logits, out.logits, strict=True):
            torch.testing.assert_close(mine[0], own[row], atol=1e-4, rtol=1e-4)


def _whole(self: Dispersion, seen: Any, start: int, stop: int, columns: int) -> list[Moments]:
    return [Moments.of(each / each.sum(-1, keepdim=True)) for each in seen.weights(start, stop)[..., :columns]]


def _late(self: Dispersion, seen: Any, start: int, stop: int, columns: int) -> list[Moments]:
    return [Moments.of(each) for each in seen.weights(start + 1, stop)[..., :columns]]


@pytest.mark.parametrize("fault", [_whole, _late], ids=["renormalised", "a query short"])
def test_a_fault_in_the_vote_shows(monkeypatch, fault):
    monkeypatch.setattr(Dispersion, "_moments", fault)
    with pytest.raises(AssertionError):
        test_kept_tokens_equal_the_paper_after_every_layer(4, 2, {})


def test_without_the_cascade_layers_do_not_share(monkeypatch):
    monkeypatch.setattr(
        settling,
        "drop",
        lambda layer: (layer.record.settle([N] * 2), settling.drop_own(layer, layer.number + 1, generated=False)),
    )
    with pytest.raises(AssertionError):
        test_kept_tokens_equal_the_paper_after_every_layer(4, 2, {})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cake(budget='many')", "budget must be"),
        ("cake(budget=32)", "budget must exceed the window of 32"),
        ("cake(window=0)", "window must be a whole number"),
        ("cake(kernel=4)", "kernel must be odd"),
        ("cake(gamma=-1)", "gamma must be a finite number of at least 0"),
        ("cake(gamma=1e999)", r"gamma must be a finite number of at least 0; got inf\.$"),
        (f"cake(gamma={'9' * 400})", "gamma must be a finite number of at least 0"),
        ("cake(tau1=0)", "tau1 must be a finite number of at least"),
        ("cake(tau1=1e999)", "tau1 must be a finite number of at least"),
        ("cake(tau2='one')", "tau2 must be a finite number"),
        ("cake(per_head='no')", "per_head must be True or False"),
        ("cake(evict_generated=1)", "evict_generated must be True or False"),
        ("cake | tokenselect", "differ from head to head"),
        ("cake | snapkv", "both decide what to keep"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)


def test_a_store_encodes_every_layer_when_the_last_has_been_observed():
    net = tiny.model(num_hidden_layers=LAYERS)
    cache = tiny.cache(net, "cake(budget=128, window=8, evict_generated=False) | kivi(bits=2, residual=32)")
    tiny.feed(net, cache, tiny.ids(1, 400))
    packed = [layer.segment.keys.nbytes for layer in cache.managed]
    assert sum(layer.held for layer in cache.managed) == 128 * LAYERS
    assert all(nbytes > 0 for nbytes in packed)
    before = [layer.nbytes for layer in cache.managed]
    tiny.feed(net, cache, tiny.ids(1, 1))
    # Nothing was left to encode: a step adds a token, and room for more.
    assert all(after >= nbytes for after, nbytes in zip([layer.nbytes for layer in cache.managed], before, strict=True))
