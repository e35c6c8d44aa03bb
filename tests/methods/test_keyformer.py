"""Keyformer: the proofs of its card (arXiv 2403.09054)."""

import pytest
import tiny
import torch
from selecting import DIM, Fed

from kvote import MethodError
from kvote.keep.score import noised
from kvote.keep.score.noised import NoisedAttention, NoisedMass, gumbel
from kvote.spec import parse

PASSES = [20] + [1] * 40
STEPS = 10
SPEC = f"keyformer(budget=16, recent=0.25, tau_end=9.0, steps={STEPS}, seed=3"


def slow(fed: Fed, passes: list[int], shared: bool = False, row: int = 0) -> list[list[set]]:
    """The paper query by query, in float64, with kvote's noise: after each pass, what every key head holds."""
    kv_heads, groups = fed.key.shape[1], fed.query.shape[1] // fed.key.shape[1]
    query, key = (fed.rotated(x, 0, fed.key.shape[2])[row].double() for x in (fed.query, fed.key))
    places = torch.arange(fed.key.shape[2])
    noise = gumbel(3, 0, places, places.expand(fed.query.shape[1], -1)).double()
    scores: list[dict[int, float]] = [{} for _ in range(kv_heads)]
    history, at = [], 0
    for count in passes:
        for token in range(at, at + count):
            tau = 1 + 8 / STEPS * min(STEPS, max(0, token - passes[0] + 1))
            for head, score in enumerate(scores):
                score[token] = 0.0
                seen = [*score]
                for member in range(head * groups, (head + 1) * groups):
                    logits = key[head, seen] @ query[member, token] * DIM**-0.5
                    parts = torch.softmax((logits + noise[member, token, seen]) / tau, dim=0).tolist()
                    for other, part in zip(seen, parts, strict=True):
                        score[other] += part
        at += count
        together = {t: sum(s[t] for s in scores) for t in scores[0]} if shared else {}
        for head, score in enumerate(scores):
            worth = together or score
            old = sorted(score)[:-4]
            best = sorted(old, key=lambda t, worth=worth: -worth[t])[:12]
            scores[head] = {t: score[t] for t in score if t in best or t not in old}
        history.append([set(score) for score in scores])
    return history


def kept(fed: Fed, row: int = 0) -> list[set[int]]:
    return [set(lane.tolist()) for lane in fed.layer.segment.positions(row)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2)])
@pytest.mark.parametrize("per_head", [True, False])
def test_kept_tokens_equal_a_slow_loop_after_every_step(heads, kv_heads, per_head):
    fed = Fed(f"{SPEC}, per_head={per_head})", heads, kv_heads, rows=2)
    expected = [slow(fed, PASSES, not per_head, row) for row in range(2)]
    for step, count in enumerate(PASSES):
        fed.feed(count)
        for row in range(2):
            assert kept(fed, row) == expected[row][step], (step, row)


def test_without_noise_and_at_temperature_one_it_is_h2o():
    feds = [Fed(spec) for spec in ("keyformer(budget=20, noise=False, tau_end=1.0)", "h2o(budget=20, recent=0.3)")]
    feds[1].query, feds[1].key, feds[1].value = feds[0].query, feds[0].key, feds[0].value
    noisy = Fed("keyformer(budget=20, tau_end=1.0)")
    noisy.query, noisy.key = feds[0].query, feds[0].key
    for count in PASSES:
        for fed in (*feds, noisy):
            fed.feed(count)
        assert kept(feds[0]) == kept(feds[1])
    assert kept(noisy) != kept(feds[1])


def test_the_same_seed_keeps_the_same_tokens_and_another_one_others():
    net, found = tiny.model(), []
    for seed in (5, 5, 6):
        cache = tiny.cache(net, f"keyformer(budget=20, seed={seed})")
        tiny.feed(net, cache, tiny.ids(1, 60))
        found.append([lane.tolist() for lane in cache.positions(1)[0]])
    assert found[0] == found[1] != found[2]


def test_noise_is_that_of_gumbel_and_its_own_for_each_query_key_head_and_layer():
    places = torch.arange(400)
    noise = gumbel(0, 0, places, places.expand(4, -1))
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - torch.pi**2 / 6) < 0.02
    others = [noise.roll(1, dims=axis) for axis in range(3)] + [
        gumbel(*at, places, places.expand(4, -1)) for at in ((0, 1), (1, 0))
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1])) < 0.01


def mean_of_draws(logits: torch.Tensor, tau: float) -> torch.Tensor:
    queries = torch.arange(20_000)
    noise = gumbel(1, 0, queries, torch.arange(len(logits))[None])[0]
    return ((logits + noise) / tau).softmax(-1).mean(0)


def test_the_mean_over_draws_tends_to_softmax_and_flattens_as_the_temperature_rises():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    torch.testing.assert_close(mean_of_draws(logits, 0.01), logits.softmax(0), atol=0.01, rtol=0)
    entropies = [float(-(p * p.log()).sum()) for p in (mean_of_draws(logits, tau) for tau in (0.1, 1.0, 2.0, 4.0))]
    assert entropies == sorted(entropies)
    assert entropies[-1] > entropies[0] + 0.2


def test_the_temperature_rises_with_generated_tokens_alone_and_stops():
    score = NoisedAttention(tau=1.0, tau_end=2.0, steps=4, noise=True, seed=0)
    assert score.temperature(torch.arange(8, 17), 10).tolist() == [1, 1, 1.25, 1.5, 1.75, 2, 2, 2, 2]


def test_noise_does_not_touch_the_output():
    net = tiny.model()
    got = tiny.generate(net, tiny.ids(2, 40), tiny.cache(net, "keyformer(budget=48)"))
    expected = tiny.generate(tiny.model(), tiny.ids(2, 40))
    assert torch.equal(got.sequences, expected.sequences)
    for mine, other in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


def test_each_head_holds_exactly_the_budget_and_nothing_returns():
    fed, before = Fed("keyformer(budget=20)"), [set(range(64))] * 2
    for count in [15, 10, *[1] * 30]:
        fed.feed(count)
        assert [len(head) for head in kept(fed)] == [min(20, fed.at)] * 2
        new = set(range(fed.at - count, fed.at))
        assert all(now - new <= then for now, then in zip(kept(fed), before, strict=True))
        before = kept(fed)


def test_passes_of_an_announced_prompt_draw_the_same_noise():
    net, held = tiny.model(), []
    for passes in (0, 7):
        cache = tiny.cache(net, "keyformer(budget=16)")
        cache.expect(60)
        tiny.feed(net, cache, tiny.ids(1, 60), passes=passes)
        tiny.feed(net, cache, tiny.ids(1, 5, seed=1), passes=1)
        held.append([lane.tolist() for lane in cache.positions(1)[0]])
    assert held[0] == held[1]


def per_key(seed: int, layer: int, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The fault: one draw per key."""
    return gumbel(seed, layer, query[:1] * 0, key).expand(-1, len(query), -1)


FAULTS = {
    "noise per key": (noised, "gumbel", per_key),
    "no temperature": (NoisedAttention, "temperature", lambda self, position, end: torch.ones(len(position))),
    "the prompt's temperature": (NoisedAttention, "temperature", lambda self, position, end: 1 + 0.2 * position),
    "sums not carried along": (NoisedMass, "keep", lambda self, row, slots: None),
    "sums forgotten": (NoisedMass, "add", lambda self, row, mass: self.rows.__setitem__(row, mass)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_sums_shows(monkeypatch, fault):
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises((AssertionError, RuntimeError)):
        test_kept_tokens_equal_a_slow_loop_after_every_step(4, 2, True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("keyformer(tau=0)", "tau must be a finite number"),
        ("keyformer(tau_end=-1)", "tau_end must be a finite number"),
        ("keyformer(steps=0)", "steps"),
        ("keyformer(noise=1)", "noise must be True or False"),
        ("keyformer(recent=0)", "recent must be a share"),
        ("keyformer | h2o", "both decide what to keep"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)
