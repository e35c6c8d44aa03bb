"""H2O: the proofs of its card (arXiv 2306.14048)."""

import pytest
import tiny
import torch
from selecting import DIM, Fed
from torch import Tensor
from watching import weights

from kvote import MethodError
from kvote.keep import evict
from kvote.keep.score.mass import Mass
from kvote.spec import parse

ONE = {"num_hidden_layers": 1}


def slow(
    fed: Fed, passes: list[int], heavy: int, recent: int, row: int = 0, shared: bool = False, burst: int = 1
) -> list[list[set]]:
    """The paper token by token, in float64: after each pass, what every key head holds. Nothing of kvote is used.

    ``burst``: generated tokens make so many go at once, as many heavy as recent ones fewer being held for it.
    """
    most = heavy + recent
    kv_heads, groups = fed.key.shape[1], fed.query.shape[1] // fed.key.shape[1]
    query, key = (fed.rotated(x, 0, fed.key.shape[2])[row].double() for x in (fed.query, fed.key))
    scores: list[dict[int, float]] = [{} for _ in range(kv_heads)]
    history, at = [], 0
    for count in passes:
        for head, score in enumerate(scores):
            score.update(dict.fromkeys(range(at, at + count), 0.0))
            for token in range(at, at + count):
                seen = [other for other in score if other <= token]
                for member in range(head * groups, (head + 1) * groups):
                    share = torch.softmax(key[head, seen] @ query[member, token] * DIM**-0.5, dim=0).tolist()
                    for other, part in zip(seen, share, strict=True):
                        score[other] += part
        at += count
        stays = most - burst + 1 if count == 1 else most
        heavy, recent = stays // 2, stays - stays // 2
        full = len(scores[0]) > most
        for head, score in enumerate(scores):
            if full:
                old = sorted(score)[: len(score) - recent]
                worth = {t: sum(s[t] for s in scores) if shared else score[t] for t in old}
                if not shared or head == 0:
                    gone = set(sorted(old, key=lambda t: -worth[t])[heavy:])
                if not shared:
                    for token in gone:
                        del score[token]
        if shared and full:
            for score in scores:
                for token in gone:
                    del score[token]
        history.append([set(score) for score in scores])
    return history


def kept(fed: Fed, row: int = 0) -> list[set[int]]:
    return [set(lane.tolist()) for lane in fed.layer.segment.positions(row)]


PASSES = {"prompt and decode": [30] + [1] * 34, "decode alone": [1] * 64, "turns": [20, 1, 1, 1, 13, 1, 1, 26]}


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (6, 1)])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("burst", [None, 5])
def test_kept_tokens_equal_a_slow_loop_after_every_step(passes, heads, kv_heads, per_head, burst):
    fed = Fed(f"h2o(budget=12, recent=0.5, per_head={per_head}, burst={burst})", heads, kv_heads, rows=2)
    expected = [slow(fed, passes, 6, 6, row, shared=not per_head, burst=burst or 1) for row in range(2)]
    for step, count in enumerate(passes):
        fed.feed(count)
        for row in range(2):
            assert kept(fed, row) == expected[row][step], (step, row)
    assert fed.layer.activity.dropped == 2 * (64 - len(expected[0][-1][0]))


@pytest.mark.parametrize(("burst", "expected"), [(None, 4), (1, 1)])
def test_a_large_budget_goes_in_bursts_unless_told_otherwise(burst, expected):
    passes = [260] + [1] * 12
    fed = Fed(f"h2o(budget=256, burst={burst})", 2, 1, n=272)
    for step, held in enumerate(slow(fed, passes, 128, 128, burst=expected)):
        fed.feed(passes[step])
        assert kept(fed) == held, step


@pytest.mark.parametrize("per_head", [True, False])
def test_heads_keep_their_own_tokens_unless_told_otherwise(per_head):
    fed = Fed(f"h2o(budget=40, per_head={per_head})", n=200)
    fed.feed(200)
    one, other = kept(fed)
    assert (one != other) == per_head
    assert len(one) == len(other) == 40


def test_the_outputs_are_those_of_attention_over_what_is_held():
    fed = Fed("h2o(budget=12)")
    fed.feed(30)
    for at in range(30, 64):
        held = [sorted(head | {at}) for head in kept(fed)]
        got = fed.feed(1)
        key, query = fed.rotated(fed.key, 0, 64), fed.rotated(fed.query, at, at + 1)
        for head in range(4):
            seen = held[head // 2]
            share = torch.softmax(key[0, head // 2, seen] @ query[0, head, 0] * DIM**-0.5, dim=0)
            torch.testing.assert_close(got[0, 0, head], share @ fed.value[0, head // 2, seen], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("budget", "recent", "share"), [(20, 0.5, 10), (21, 0.5, 11), (20, 0.9, 18), (20, 1, 20)])
def test_as_many_tokens_are_held_as_the_budget_says_after_each_step(budget, recent, share):
    net = tiny.model()
    cache = tiny.cache(net, f"h2o(budget={budget}, recent={recent})")
    for count in (15, 40, 1, 1, 1, 7, 1):
        tiny.feed(net, cache, tiny.ids(2, count))
        seen = cache.get_seq_length()
        for lane in (lane for layer in range(2) for row in cache.positions(layer) for lane in row):
            assert len(lane) == min(budget, seen)
            assert lane[-min(share, seen) :].tolist() == list(range(seen - min(share, seen), seen))


def test_a_fraction_grows_with_the_text():
    net = tiny.model()
    cache = tiny.cache(net, "h2o")
    tiny.feed(net, cache, tiny.ids(1, 100))
    sizes = [len(cache.positions(0)[0][0])]
    for _ in range(20):
        tiny.feed(net, cache, tiny.ids(1, 1))
        sizes.append(len(cache.positions(0)[0][0]))
    assert sizes == [int(0.2 * seen) for seen in range(100, 121)]


def test_a_budget_that_covers_the_text_is_dense_attention():
    net = tiny.model()
    got = tiny.generate(net, tiny.ids(2, 40), tiny.cache(net, "h2o(budget=48)"))
    expected = tiny.generate(tiny.model(), tiny.ids(2, 40))
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("passes", [0, 9])
def test_the_logits_of_the_prompt_are_exact(passes):
    expected = tiny.feed(tiny.model(), None, tiny.ids(2, 60))
    net = tiny.model()
    cache = tiny.cache(net, "h2o(budget=10)")
    cache.expect(60)
    got = tiny.feed(net, cache, tiny.ids(2, 60), passes=passes)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert cache.report().layers[0].dropped == 100


def test_an_announced_prompt_in_passes_is_one_prompt():
    net = tiny.model()
    whole, parts, blind = (tiny.cache(net, "h2o(budget=16)") for _ in range(3))
    tiny.feed(net, whole, tiny.ids(1, 60))
    parts.expect(60)
    tiny.feed(net, parts, tiny.ids(1, 60), passes=7)
    tiny.feed(net, blind, tiny.ids(1, 60), passes=7)
    held = [[lane.tolist() for lane in cache.positions(1)[0]] for cache in (whole, parts, blind)]
    assert held[0] == held[1] != held[2]
    for count in (1, 1, 5):
        a, b = (tiny.feed(net, cache, tiny.ids(1, count, seed=count)) for cache in (whole, parts))
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def directed(n: int, loved: int | None = None, shunned: int | None = None) -> Fed:
    """Queries that all look the same way, and keys of which one is liked, or disliked, by all of them."""
    fed = Fed("h2o(budget=12)", 2, 2, n=n)
    fed.rope.apply = lambda x, angles: x  # no rotation: what is liked is liked from everywhere
    fed.query = torch.ones_like(fed.query)
    fed.key = 0.1 * torch.randn_like(fed.key)
    if loved is not None:
        fed.key[:, :, loved] = 3.0
    if shunned is not None:
        fed.key[:, :, shunned] = -3.0
    return fed


def test_a_token_that_all_look_at_survives_long_after_it_left_the_window():
    fed = directed(200, loved=20)
    for _ in range(200):
        fed.feed(1)
    assert all(20 in head for head in kept(fed))
    assert all(len(head) == 12 for head in kept(fed))


def test_a_token_that_nobody_looks_at_goes_the_moment_it_leaves_the_window():
    fed = directed(60, shunned=30)
    for at in range(60):
        fed.feed(1)
        assert all((30 in head) == (30 <= at < 36) for head in kept(fed))


def test_recent_tokens_earn_while_they_are_protected():
    fed = Fed("h2o(budget=12)")
    for _ in range(40):
        fed.feed(1)
    whole = weights(fed.rotated(fed.query, 0, 6), fed.rotated(fed.key, 0, 6), DIM**-0.5)
    assert whole.shape[-1] == 6
    memory = fed.layer.record.memory
    assert all(bool((held[:, -3] > 0).all()) for held in memory.rows.values())
    last_own = memory.rows[0][:, -1]
    assert bool((last_own <= 2).all() and (last_own > 0).all())


def test_sums_are_those_of_float32_even_for_half_precision_models():
    net = tiny.model().to(torch.bfloat16)
    try:
        cache = tiny.cache(net, "h2o(budget=30)")
        tiny.feed(net, cache, tiny.ids(1, 100))
        assert all(held.dtype == torch.float32 for held in cache.managed[0].record.memory.rows.values())
        assert cache.report().layers[0].dropped == 70
    finally:
        net.to(torch.float32)


def test_the_rows_of_a_batch_do_not_count_for_each_other():
    net = tiny.model()
    tokens, mask = tiny.padded(3, 60, [0, 25, 7])
    cache = tiny.cache(net, "h2o(budget=12)")
    tiny.feed(net, cache, tokens, mask)
    for row, pads in enumerate([0, 25, 7]):
        alone = tiny.cache(net, "h2o(budget=12)")
        tiny.feed(net, alone, tokens[row : row + 1, pads:])
        for layer in range(2):
            mine, own = cache.positions(layer)[row], alone.positions(layer)[0]
            assert [lane.tolist() for lane in mine] == [lane.tolist() for lane in own]


def sooner(self: Mass, row: int, mass: Tensor) -> None:
    """The fault: sums stay behind by one token."""
    held = self.rows.get(row)
    mass = mass.clone()
    if held is not None:
        mass[:, 1 : held.shape[1] + 1] += held[:, : mass.shape[1] - 1]
    self.rows[row] = mass


FAULTS = {
    "sums of other tokens": (Mass, "add", sooner),
    "sums not carried along": (Mass, "keep", lambda self, row, slots: None),
    "sums forgotten": (Mass, "add", lambda self, row, mass: self.rows.__setitem__(row, mass.clone())),
    "the least heavy": (evict.kernels, "top_k", lambda votes, k: (-votes).topk(k).indices.sort().values),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_sums_shows(monkeypatch, fault):
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises((AssertionError, RuntimeError)):
        test_kept_tokens_equal_a_slow_loop_after_every_step([30] + [1] * 34, 4, 2, True, None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("h2o(budget=0)", "budget must be"),
        ("h2o(recent=0)", "recent must be a share"),
        ("h2o(recent=1.5)", "recent must be a share"),
        ("h2o(recent='half')", "recent must be a share"),
        ("h2o(per_head=1)", "per_head must be True or False"),
        ("h2o(burst=0)", r"burst must be a whole number of tokens from 1 to 64, or None; got 0\.$"),
        ("h2o | snapkv", "both decide what to keep"),
        ("h2o | streamingllm", "both decide what to keep"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)
