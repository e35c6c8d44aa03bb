"""The baseline that keeps tokens by lot."""

import pytest
import tiny
import torch
from selecting import Fed

from kvote import MethodError
from kvote.keep.score.random_score import RandomScore
from kvote.methods import randomkeep
from kvote.spec import parse

N, BUDGET, SINKS, WINDOW = 64, 24, 3, 8
SPEC = f"randomkeep(budget={BUDGET}, sinks={SINKS}, window={WINDOW}"


def kept(fed: Fed, row: int = 0) -> list[list[int]]:
    return [lane.tolist() for lane in fed.layer.segment.positions(row)]


def test_sinks_and_window_stay_and_the_rest_wins_by_lot():
    fed = Fed(f"{SPEC})", rows=2)
    fed.feed(N)
    random_worth = RandomScore(seed=0).random_worth(torch.arange(N)).tolist()
    between = sorted(range(SINKS, N - WINDOW), key=lambda i: -random_worth[i])[: BUDGET - SINKS - WINDOW]
    wanted = [*range(SINKS), *sorted(between), *range(N - WINDOW, N)]
    assert [kept(fed, row) for row in range(2)] == [[wanted, wanted]] * 2
    assert fed.layer.activity.dropped == 2 * (N - BUDGET)


def test_lots_are_even_and_the_seed_decides_them():
    one, other = (RandomScore(seed=seed).random_worth(torch.arange(100_000)) for seed in (0, 1))
    for random_worth in (one, other):
        counts = torch.histc(random_worth, bins=20, min=0, max=1)
        assert bool(((counts - 5000).abs() < 400).all())
        # Neighbours do not stay together.
        assert abs(torch.corrcoef(torch.stack([random_worth[:-1], random_worth[1:]]))[0, 1].item()) < 0.02
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1].item()) < 0.02


def test_seeds_differ_and_one_seed_repeats_itself():
    held = []
    for seed in (0, 0, 1):
        fed = Fed(f"{SPEC}, seed={seed})")
        fed.feed(N)
        held.append(kept(fed)[0])
    assert held[0] == held[1] != held[2]


def test_what_is_generated_stays_until_the_next_prompt():
    net = tiny.model()
    cache = tiny.cache(net, f"{SPEC})")
    tiny.generate(net, tiny.ids(2, N), cache, max_new_tokens=40)
    lanes = [lane.tolist() for layer in range(2) for row in cache.positions(layer) for lane in row]
    assert all(lane == lanes[0] for lane in lanes)
    assert lanes[0][-39 - WINDOW :] == list(range(N - WINDOW, N + 39))
    assert len(lanes[0]) == BUDGET + 39
    tiny.feed(net, cache, tiny.ids(2, 5))
    assert all(len(lane) == BUDGET for row in cache.positions(0) for lane in row)


def test_what_wins_is_among_what_a_larger_budget_keeps():
    small, large = (Fed(f"randomkeep(budget={n}, sinks={SINKS}, window={WINDOW})") for n in (BUDGET, 2 * BUDGET))
    for fed in (small, large):
        fed.feed(N)
    assert set(kept(small)[0]) < set(kept(large)[0])


def test_the_logits_of_the_prompt_are_exact():
    expected = tiny.feed(tiny.model(), None, tiny.ids(2, N))
    net = tiny.model()
    cache = tiny.cache(net, f"{SPEC})")
    torch.testing.assert_close(tiny.feed(net, cache, tiny.ids(2, N)), expected, atol=1e-4, rtol=1e-4)
    assert cache.report().layers[1].dropped == 2 * (N - BUDGET)


def test_fewer_tokens_than_sinks_and_window_are_not_kept():
    fed = Fed("randomkeep(budget=0.1, sinks=4, window=8)")
    fed.feed(N)
    assert kept(fed)[0] == [*range(4), *range(N - 8, N)]


def test_a_budget_of_bytes_is_obeyed():
    net = tiny.model()
    cache = tiny.cache(net, "randomkeep(budget='200KB', window=8)")
    tiny.feed(net, cache, tiny.ids(1, 1000))
    layer = cache.report().layers[0]
    assert layer.dropped > 0
    assert layer.tokens_held == layer.budget
    assert 100_000 < cache.nbytes() < 200_000


def test_a_fault_in_the_draw_shows(monkeypatch):
    monkeypatch.setattr(RandomScore, "random_worth", lambda self, positions: positions.float())
    for test in (test_lots_are_even_and_the_seed_decides_them, test_seeds_differ_and_one_seed_repeats_itself):
        with pytest.raises(AssertionError):
            test()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("randomkeep(budget=0)", "budget must be"),
        ("randomkeep(budget=20)", "budget must cover the 4 sinks and the window of 32"),
        ("randomkeep(sinks=-1)", "sinks must be a whole number of at least 0"),
        ("randomkeep(window=0)", "window must be a whole number of at least 1"),
        ("randomkeep(seed='x')", "seed must be a whole number"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)


def test_the_largest_values_of_each_head_stay_and_the_rest_wins_by_lot():
    fed = Fed(f"{SPEC}, protect=0.25)")
    fed.feed(N)
    random_worth = RandomScore(seed=0).random_worth(torch.arange(N)).tolist()
    edge, guarded = N - WINDOW, BUDGET // 4
    for head, lane in enumerate(kept(fed)):
        large = set(fed.value[0, head, :edge].norm(dim=-1).topk(guarded).indices.tolist())
        order = sorted(range(SINKS, edge), key=lambda i: (i not in large, -random_worth[i]))
        drawn = order[: BUDGET - SINKS - WINDOW]
        assert large - set(range(SINKS)) <= set(drawn)
        assert lane == [*range(SINKS), *sorted(drawn), *range(edge, N)]
    assert kept(fed)[0] != kept(fed)[1]


def test_the_budget_holds_while_generating_where_that_is_asked_for():
    net = tiny.model()
    cache = tiny.cache(net, f"{SPEC}, protect=0.25, evict_generated=True)")
    tiny.generate(net, tiny.ids(2, N), cache, max_new_tokens=40)
    lanes = [lane for layer in range(2) for row in cache.positions(layer) for lane in row]
    assert all(len(lane) <= BUDGET for lane in lanes)
    # What won a draw once may win again: old tokens are among those that are left, beside sinks and window.
    assert all(lane[:SINKS].tolist() == list(range(SINKS)) and lane[SINKS] < N for lane in lanes)


@pytest.mark.parametrize("share", [-0.1, 1.5, "much", float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(MethodError, match="protect"):
        randomkeep(protect=share)
