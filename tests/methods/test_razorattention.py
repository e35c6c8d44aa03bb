"""RazorAttention: the proofs of its card (arXiv 2407.15891), but for the search (tests/calibration)."""

import copy
import itertools
from dataclasses import replace

import pytest
import scored
import tiny
import torch
from torch import Tensor
from watching import weights

import kvote
from kvote import InputError, MethodError
from kvote.keep.budget import Budget
from kvote.keep.keeper import Held
from kvote.keep.merge.means import Means, recent_and_mean
from kvote.layer import Layer, Step
from kvote.method import Method
from kvote.methods import razorattention
from kvote.needs import Needs, StoreOffers
from kvote.spec import parse
from kvote.store.pages import PAGE
from kvote.store.segment import Scaling
from kvote.store.uncompressed import Uncompressed

DIM, SINKS, RECENT = 16, 2, 6
HEADS = [[0.9, 0.1], [0.2, 0.8]]


def method(net, **changes) -> Method:
    """One key head of each layer keeps everything."""
    settings = {"sinks": SINKS, "least": RECENT, "share": 0.0, "induction": 0.5, **changes}
    return razorattention(heads=scored.razor(net, HEADS), **settings)


def few(compensation: bool = True) -> Layer:
    return Layer(0, Method(keep=recent_and_mean(Budget(SINKS + RECENT), SINKS, compensation)), None)


def step(query: Tensor, key: Tensor, value: Tensor, at: int, softcap: float | None = None) -> Step:
    positions = torch.arange(at, at + key.shape[2]).expand(key.shape[0], -1)
    decode = key.shape[2] == 1
    logits = Scaling(DIM**-0.5, softcap)
    return Step(query, key, value, positions, None, 1, logits, decode=decode, prompt_left=None if decode else 0)


def full(query: Tensor, key: Tensor, value: Tensor, softcap: float | None = None) -> Tensor:
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return (weights(query, key, DIM**-0.5, softcap).float() @ value).transpose(1, 2)


def alike(n: int, spread: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of ``n`` + 3 tokens; those that a prompt of ``n`` drops differ by ``spread`` only."""
    query, key, value = torch.randn(2, 4, n + 3, DIM), torch.randn(2, 2, n + 3, DIM), torch.randn(2, 2, n + 3, DIM)
    for x in (key, value):
        # Those that are dropped while three more are generated, too.
        x[:, :, SINKS : n + 3 - RECENT] = x[:, :, SINKS : SINKS + 1] + spread * torch.randn(n + 1 - RECENT, DIM)
    return query, key, value


def answers(layer: Layer, parts: tuple[Tensor, Tensor, Tensor], n: int, softcap: float | None = None) -> Tensor:
    """What the three queries after a prompt of ``n`` tokens answer."""
    layer.attend(step(*(x[:, :, :n] for x in parts), 0, softcap))
    each = [layer.attend(step(*(x[:, :, i : i + 1] for x in parts), i, softcap)) for i in range(n, n + 3)]
    return torch.cat(each, dim=1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("n", [9, 40, 300])
def test_equal_tokens_are_replaced_by_one_exactly_and_not_without_their_number(n, softcap, monkeypatch):
    parts = alike(n)
    expected = full(*parts, softcap)[:, -3:]
    layer = few()
    torch.testing.assert_close(answers(layer, parts, n, softcap), expected, atol=1e-5, rtol=1e-5)
    assert layer.activity.dropped == 2 * (n + 3 - SINKS - RECENT)
    assert (answers(few(compensation=False), parts, n, softcap) - expected).abs().max() > 1e-2
    # As if the mean stood for one token.
    one = Means.attend
    monkeypatch.setattr(
        Means,
        "attend",
        lambda self, *args: one(Means({row: replace(mean, count=1) for row, mean in self.rows.items()}), *args),
    )
    if n > 9:
        assert (answers(few(), parts, n, softcap) - expected).abs().max() > 1e-2


def test_the_error_falls_with_the_square_of_the_spread_of_keys():
    """Values are equal, so that nothing but the denominator is off."""
    errors = []
    for spread in (0.2, 0.1, 0.05, 0.025):
        torch.manual_seed(3)
        query, key, value = (x.double() for x in alike(60, spread))
        value[:, :, SINKS : 63 - RECENT] = value[:, :, SINKS : SINKS + 1]
        got = answers(few(), (query, key, value), 60)
        expected = full(query, key, value.float()).double()[:, -3:]
        errors.append(float((got - expected).norm()))
    for large, small in itertools.pairwise(errors):
        assert 3.3 < large / small < 4.7


def test_the_mean_is_that_of_all_dropped_keys_as_cached_however_they_were_dropped():
    net = tiny.model()
    cache, passes = kvote.Cache(net, method(net)), kvote.Cache(net, method(net))
    tokens = tiny.ids(2, 60)
    watched = kvote.Cache(net, "dense")
    expected = tiny.feed(net, watched, tokens)
    tiny.feed(net, cache, tokens)
    passes.expect(60)
    # Nothing is dropped before the end of an announced prompt.
    torch.testing.assert_close(tiny.feed(net, passes, tokens, passes=7), expected, atol=1e-4, rtol=1e-4)
    for held in (cache, passes):
        [group] = [g for g in held.layers[0].layer.head_groups if g.heads == (1,)]
        key, value = watched.managed[0].segment.decode([0, 1], SINKS, 60 - RECENT)
        for row in range(2):
            mean = group.layer.record.memory.rows[row]
            assert mean.count == 60 - SINKS - RECENT
            torch.testing.assert_close(mean.key, key[row, 1:].mean(1))
            torch.testing.assert_close(mean.value, value[row, 1:].mean(1))


def test_a_running_mean_is_the_mean():
    key, value = torch.randn(2, 50, DIM), torch.randn(2, 50, DIM)
    memory, at = Means(), 0
    for count in (1, 7, 1, 30, 11):
        memory.fold(3, key[:, at : at + count], value[:, at : at + count])
        at += count
    assert memory.rows[3].count == 50
    torch.testing.assert_close(memory.rows[3].key, key.mean(1))
    torch.testing.assert_close(memory.rows[3].value, value.mean(1))
    assert memory.nbytes == 2 * 2 * DIM * 4


@pytest.mark.parametrize("length", [1, SINKS + RECENT, SINKS + RECENT + 1, 50])
def test_others_keep_sinks_and_recent_and_the_prompt_is_read_in_full(length):
    net = tiny.model()
    tokens = tiny.ids(2, length)
    expected = tiny.feed(net, None, tokens)
    cache = kvote.Cache(net, method(net))
    torch.testing.assert_close(tiny.feed(net, cache, tokens), expected, atol=1e-4, rtol=1e-4)
    kept = list(range(length))
    kept = kept if length <= SINKS + RECENT else kept[:SINKS] + kept[-RECENT:]
    for layer, whole in enumerate([0, 1]):
        for lanes in cache.positions(layer):
            assert lanes[whole].tolist() == list(range(length))
            assert lanes[1 - whole].tolist() == kept
    tiny.feed(net, cache, tiny.ids(2, 5, seed=4), passes=1)
    dropped = 2 * max(0, length + 5 - SINKS - RECENT)
    assert [layer.dropped for layer in cache.report().layers] == [dropped] * 2


@pytest.mark.parametrize(("least", "share", "held"), [(10, 0.2, 42), (60, 0.2, 62), (1, 0.05, 12), (1, 0.0, 3)])
def test_the_buffer_is_the_larger_of_a_number_and_a_share_of_the_tokens_seen(least, share, held):
    net = tiny.model()
    cache = kvote.Cache(net, method(net, least=least, share=share))
    tiny.feed(net, cache, tiny.ids(1, 200))
    assert len(cache.positions(0)[0][1]) == held == cache.report().layers[0].budget


@pytest.mark.parametrize(("budget", "held"), [(12, 12), (0.25, 50)])
def test_a_budget_is_what_each_of_the_other_heads_holds(budget, held):
    net = tiny.model()
    cache = kvote.Cache(net, method(net, budget=budget))
    tiny.feed(net, cache, tiny.ids(1, 200))
    assert len(cache.positions(0)[0][1]) == held == cache.report().layers[0].budget


def test_a_budget_in_bytes_is_for_the_other_heads_of_all_layers():
    net = tiny.model(num_hidden_layers=3, num_key_value_heads=4)
    # 4 + 1 + 2 of the 12 heads do not keep everything.
    heads = scored.razor(net, [[0, 0, 0, 0], [1, 1, 0, 1], [1, 0, 0, 1]])
    limit = 7 * 20 * PAGE * (2 * DIM + 1) * 4
    cache = kvote.Cache(net, razorattention(heads=heads, sinks=2, budget=f"{limit}B", induction=5 / 12))
    tiny.feed(net, cache, tiny.ids(1, 3000))
    others = [g.layer for layer in cache.layers for g in layer.layer.head_groups if g.layer.method.keep.offers.drops]
    assert sum(len(g.heads) for layer in cache.layers for g in layer.layer.head_groups if g.layer in others) == 7
    lengths = {layer.segment.length(0) for layer in others}
    assert sum(layer.segment.nbytes for layer in others) <= limit
    # Heads of layers that have few of them do not get more.
    assert max(lengths) - min(lengths) <= 2 * PAGE
    assert min(lengths) > 12 * PAGE
    assert cache.report().layers[0].dropped > 0


def test_bytes_are_those_of_whole_heads_and_of_sinks_recent_and_a_mean():
    net = tiny.model()
    cache = kvote.Cache(net, method(net, least=4 * PAGE - SINKS))
    dense = kvote.Cache(net, "dense")
    for each in (cache, dense):
        each.expect(40 * PAGE)
        tiny.feed(net, each, tiny.ids(1, 40 * PAGE))
    few, whole = (g.layer for g in cache.layers[0].layer.head_groups)
    assert (few.segment.length(0), whole.segment.length(0)) == (4 * PAGE, 40 * PAGE)
    # One of two heads holds what a head of a dense cache holds; the other four pages, and a mean on top.
    page = PAGE * (2 * DIM + 1) * 4
    assert 2 * whole.nbytes == dense.managed[0].nbytes >= 2 * 40 * page
    assert few.record.nbytes == 2 * DIM * 4
    assert 4 * page <= few.segment.nbytes < 4 * page + 64
    assert [layer.nbytes for layer in cache.report().layers] == [whole.nbytes + few.nbytes] * 2
    assert cache.nbytes() == sum(layer.nbytes for layer in cache.managed) < 0.6 * dense.nbytes()
    tiny.feed(net, cache, tiny.ids(1, 20), passes=1)
    # Tokens go in bursts of a 64th of what is not sinks.
    assert 4 * PAGE - 3 < few.segment.length(0) <= 4 * PAGE
    # While tokens come and go, pages of one step more.
    assert few.segment.nbytes < 8 * page


def test_without_compensation_what_is_dropped_is_gone():
    net = tiny.model(num_hidden_layers=1)
    tokens = tiny.ids(1, 40)
    other = tokens.clone()
    other[:, 10:20] = tiny.ids(1, 10, seed=7)
    for compensation in (True, False):
        made = razorattention(
            heads=scored.razor(net, [[0.0, 0.0]]), sinks=2, least=6, share=0, induction=0, compensation=compensation
        )
        got = []
        for each in (tokens, other):
            cache = kvote.Cache(net, made)
            tiny.feed(net, cache, each)
            got.append(tiny.feed(net, cache, tiny.ids(1, 1, seed=3)))
            assert cache.report().layers[0].dropped > 0
        assert torch.equal(*got) is not compensation


def test_rows_of_one_length_that_have_dropped_differently_answer_as_alone():
    """A padded row that has dropped nothing, and one that has dropped much, hold equally many tokens."""
    net = tiny.model()
    tokens, mask = tiny.padded(3, 60, [60 - SINKS - RECENT, 0, 31])
    cache = kvote.Cache(net, method(net))
    tiny.feed(net, cache, tokens, mask)
    extra = tiny.ids(3, 4, seed=2)
    got = tiny.feed(net, cache, extra, torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], dim=1), passes=1)
    for row, pad in enumerate([60 - SINKS - RECENT, 0, 31]):
        alone = kvote.Cache(net, method(net))
        tiny.feed(net, alone, tokens[row : row + 1, pad:])
        expected = tiny.feed(net, alone, extra[row : row + 1], passes=1)
        torch.testing.assert_close(got[row : row + 1], expected, atol=1e-4, rtol=1e-4)


def test_means_follow_beams_and_copies():
    net = tiny.model()
    cache = kvote.Cache(net, method(net))
    tokens = tiny.ids(2, 40)
    tiny.feed(net, cache, tokens)
    cache.reorder_cache(torch.tensor([1, 1]))
    clone = copy.deepcopy(cache)
    one = tiny.feed(net, clone, tiny.ids(2, 3, seed=5), passes=1)
    fresh = kvote.Cache(net, method(net))
    tiny.feed(net, fresh, tokens[[1, 1]])
    torch.testing.assert_close(tiny.feed(net, fresh, tiny.ids(2, 3, seed=5), passes=1), one, atol=1e-5, rtol=1e-5)
    memory = next(g.layer.record.memory for g in cache.layers[0].layer.head_groups if g.heads == (1,))
    assert {mean.count for mean in memory.rows.values()} == {40 - SINKS - RECENT}
    # Both sequences share one mean until they go on.
    assert memory.nbytes == 2 * DIM * 4


def test_a_crop_after_an_announced_recording_keeps_what_was_dropped_before_it():
    net = tiny.model()
    cropped, fresh = kvote.Cache(net, method(net)), kvote.Cache(net, method(net))
    for cache in (cropped, fresh):
        tiny.feed(net, cache, tiny.ids(1, 40))
    cropped.activate_past_recording()
    tiny.feed(net, cropped, tiny.ids(1, 6, seed=8))
    cropped.crop(-6)
    for layer in cropped.layers:
        layer.record_past = False
    extra = tiny.ids(1, 4, seed=9)
    got, expected = (tiny.feed(net, cache, extra, passes=1) for cache in (cropped, fresh))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {}], ids=str)
def test_generate_drops_and_answers_as_if_fed_by_hand(more):
    net = tiny.model()
    tokens, mask = tiny.padded(2, 40, [5, 0])
    cache = kvote.Cache(net, method(net))
    made = tiny.generate(net, tokens, cache, mask, **more)
    rows = max(more.get("num_beams", 1), more.get("num_return_sequences", 1))
    assert cache.report().layers[0].dropped > 0
    assert cache.report().layers[0].tokens_seen == 47
    if "num_beams" in more:
        assert made.sequences.shape == (2, 48)
        return
    again = kvote.Cache(net, method(net))
    text = made.sequences
    longer = torch.cat([mask.repeat_interleave(rows, 0), torch.ones(len(text), 8, dtype=torch.long)], dim=1)
    tiny.feed(net, again, text[:, :40], longer[:, :40])
    logits = tiny.feed(net, again, text[:, 40:47], longer[:, :47], passes=1)
    torch.testing.assert_close(torch.stack(made.logits[1:], 1), logits, atol=1e-4, rtol=1e-4)


# A store that would have to encode anew with every token dropped, and whose tokens can only be read as a whole.
class Grouped(Uncompressed):
    needs = Needs(lasting=True)
    offers = StoreOffers(lists=False)


GROUPED = Grouped()


def test_a_store_is_for_the_heads_that_keep_everything():
    net = tiny.model()
    joined = method(net) | Method("grouped", store=GROUPED)
    cache = kvote.Cache(net, joined)
    tiny.feed(net, cache, tiny.ids(1, 40))
    tiny.feed(net, cache, tiny.ids(1, 3), passes=1)
    stores = {g.layer.method.keep.offers.drops: g.layer.method.store for g in cache.layers[0].layer.head_groups}
    assert stores == {True: Uncompressed(), False: GROUPED}
    assert cache.report().layers[0].dropped > 0
    with pytest.raises(MethodError, match="dropped while generating"):
        parse("h2o") | Method("grouped", store=GROUPED)


def test_a_reader_is_for_the_heads_that_keep_everything():
    """With a selection that covers all, as without one; with a smaller one, they read it and nothing else."""
    net = tiny.model()
    caches = [kvote.Cache(net, method(net))]
    caches += [
        kvote.Cache(net, method(net) | parse(f"tokenselect(top_k={k}, sinks=2, window=6, chunk=4, theta=2.0)"))
        for k in (500, 5)
    ]
    got = []
    for cache in caches:
        tiny.feed(net, cache, tiny.ids(1, 60))
        got.append(tiny.feed(net, cache, tiny.ids(1, 4, seed=2), passes=1))
        assert cache.report().layers[0].dropped > 0
    torch.testing.assert_close(got[0], got[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got[0], got[2], atol=1e-3)
    layers = {g.layer.method.keep.offers.drops: g.layer for g in caches[2].layers[0].layer.head_groups}
    assert layers[False].activity.selections > 0
    # 2 sinks, 5 winners, a window of 6 and the query itself; the other head reads the 8 that it holds and its own.
    assert layers[False].activity.tokens_read == 14
    assert (layers[True].activity.selections, layers[True].activity.tokens_read) == (0, 9)
    assert layers[True].segment.rope is None


def test_keepers_of_raw_keys_are_refused():
    keeper = recent_and_mean(Budget(8), SINKS)
    with pytest.raises(MethodError, match="needs keys as the model rotated them"):
        Method(keep=keeper) | parse("tokenselect")


@pytest.mark.parametrize(
    ("induction", "echo", "whole"),
    [
        (0.25, 0.0, {(0, 0)}),
        (0.25, 0.25, {(0, 0), (0, 1)}),
        (0.5, 0.25, {(0, 0), (1, 1), (0, 1)}),
        (0.5, 0.5, {(0, 0), (1, 1), (0, 1), (1, 0)}),
        (0.0, 0.0, set()),
        (1.0, 0.0, {(0, 0), (0, 1), (1, 0), (1, 1)}),
        (0.12, 0.12, set()),
    ],
)
def test_heads_are_ranked_over_all_layers_together(induction, echo, whole):
    net = tiny.model()
    scores = scored.razor(net, [[0.9, 0.3], [0.2, 0.8]], [[0.0, 0.5], [0.4, 0.1]])
    keep = razorattention(heads=scores, induction=induction, echo=echo).keep
    assert keep.whole == whole
    assert keep.others == 4 - len(whole)
    assert keep.offers.drops is (len(whole) < 4)


def test_published_shares():
    net = tiny.model(num_hidden_layers=25, num_key_value_heads=4)
    draw = torch.rand(2, 25, 4, generator=torch.Generator().manual_seed(0))
    keep = razorattention(heads=scored.razor(net, *draw.tolist())).keep
    flat = draw.flatten(1)
    expected = {divmod(int(i), 4) for i in [*flat[0].topk(14).indices, flat[1].argmax()]}
    assert keep.whole == expected
    assert (keep.few.sinks, keep.few.budget) == (4, Budget(0.2, "fraction", 4000, 4))
    assert keep.few.budget.tokens(10_000) == 4004
    assert keep.few.budget.tokens(100_000) == 20_004


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ("", r"razorattention needs to know this model's heads: run `kvote calibrate .*--what razor.*heads='FILE'"),
        ("heads=3", "heads must be the name of a file; got 3"),
        ("heads='{file}', share=2", "share must be a share from 0 to 1"),
        ("heads='{file}', induction='x'", "induction must be a share"),
        ("heads='{file}', echo=-1", "echo must be a share"),
        ("heads='{file}', least=0", "least must be a whole number of at least 1"),
        ("heads='{file}', sinks=-1", "sinks must be a whole number of at least 0"),
        ("heads='{file}', sinks=8, budget=8", "budget must exceed the 8 sinks"),
        ("heads='{file}', budget='x'", "budget must be tokens"),
        ("heads='{file}', compensation=1", "compensation must be True or False"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters, sentence):
    file = scored.file(scored.razor(tiny.model(), HEADS))
    with pytest.raises(MethodError, match=sentence):
        parse(f"razorattention({parameters.format(file=file)})")


def test_another_models_heads_are_refused():
    made = method(tiny.model(seed=1))
    with pytest.raises(InputError, match="was made for another model"):
        kvote.Cache(tiny.model(), made)


def test_a_layer_that_was_not_calibrated_is_refused():
    net = tiny.model()
    scores = scored.razor(net, HEADS)
    del scores.data["layers"]["1"]
    with pytest.raises(InputError, match="does not say which of the 2 key heads of layer 1 keep everything"):
        kvote.Cache(net, razorattention(heads=scores))


def test_a_window_of_one_is_the_least():
    layer = few()
    parts = alike(40)
    layer.attend(step(*(x[:, :, :40] for x in parts), 0))
    held = Held(0, 8, 1, layer.segment, [], 0, 1)
    assert layer.method.keep.survivors(held, Means()).slots.tolist() == [0, 1, 7]
