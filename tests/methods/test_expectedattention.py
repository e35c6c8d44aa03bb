"""Expected Attention: the proofs of its card (arXiv 2510.00636)."""

from dataclasses import replace

import pytest
import tiny
import torch
from selecting import DIM, Fed
from torch import Tensor

from kvote import MethodError
from kvote.keep.score import expected
from kvote.keep.score.expected import ExpectedQueries, Gaussian, log_expected
from kvote.spec import parse

N, BUDGET, SINKS, FUTURE = 64, 24, 4, 16
JOINT = f"expectedattention(budget={BUDGET}, sinks={SINKS}, future={FUTURE}"
SPEC = f"{JOINT}, safeguard=1"


def matrix(fed: Fed, position: int) -> Tensor:
    """The rotation of one position, [d, d], as its effect on each unit vector."""
    cos, sin = fed.rope.angles(torch.tensor([[position]]), torch.float32)
    return torch.stack([fed.rope.apply(unit[None, None], (cos, sin))[0, 0] for unit in torch.eye(DIM)], dim=1)


def worth_of(fed: Fed, n: int, row: int = 0, future: int = FUTURE, **rules: bool) -> Tensor:
    """The published lines, query head by query head, in float64, of tokens after the sinks [h, n]."""
    kv_heads, groups = fed.key.shape[1], fed.query.shape[1] // fed.key.shape[1]
    mean_turn = torch.stack([matrix(fed, n + i) for i in range(future)]).mean(0).double()
    keys, worth = fed.rotated(fed.key, 0, n)[row].double(), torch.zeros(kv_heads, n - SINKS, dtype=torch.float64)
    for head in range(fed.query.shape[1]):
        queries = fed.query[row, head, SINKS:n].double()
        mu, sigma = mean_turn @ queries.mean(0), mean_turn @ torch.cov(queries.T, correction=0) @ mean_turn.T
        key = keys[head // groups, SINKS:]
        z = key @ mu / DIM**0.5
        if rules.get("covariance", True):
            z += 0.5 * torch.einsum("nd,de,ne->n", key, sigma, key) / DIM
        worth[head // groups] += z.softmax(0) / groups
    if rules.get("values", True):
        worth *= fed.value[row, :, SINKS:n].double().norm(dim=-1)
    return worth


def slow(fed: Fed, n: int, row: int = 0, shared: bool = False, **rules: bool) -> list[list[int]]:
    """What stays where all key heads keep equally many."""
    worth = worth_of(fed, n, row, **rules)
    worth = worth.sum(0, keepdim=True).expand(len(worth), -1) if shared else worth
    best = worth[:, : n - SINKS - 1].topk(BUDGET - SINKS - 1).indices + SINKS
    return [[*range(SINKS), *sorted(head.tolist()), n - 1] for head in best]


def kept(fed: Fed, row: int = 0) -> list[list[int]]:
    return [lane.tolist() for lane in fed.layer.segment.positions(row)]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (6, 1)])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("rules", [{}, {"covariance": False}, {"values": False}], ids=str)
def test_kept_tokens_equal_the_published_lines(heads, kv_heads, per_head, rules):
    told = "".join(f", {name}={value}" for name, value in rules.items())
    fed = Fed(f"{SPEC}, per_head={per_head}{told})", heads, kv_heads, rows=2)
    fed.feed(N)
    for row in range(2):
        assert kept(fed, row) == slow(fed, N, row, shared=not per_head, **rules)
    assert fed.layer.activity.dropped == 2 * (N - BUDGET)


@pytest.mark.parametrize("passes", [[40, 24], [3, 59, 2], [16] * 4], ids=str)
def test_queries_of_an_announced_prompt_count_together(passes):
    fed = Fed(f"{SPEC})")
    at = 0
    for count in passes:
        at += count
        fed.feed(count, prompt_left=N - at)
    assert kept(fed) == slow(fed, N)


def test_heads_of_a_layer_compete():
    fed = Fed(f"{JOINT}, safeguard=0.0)")
    fed.value[:, 0] *= 1.3
    fed.feed(N)
    worth = worth_of(fed, N)[:, :-1]
    best = worth.flatten().topk(2 * (BUDGET - SINKS - 1)).indices
    expected = [sorted((best[best // worth.shape[1] == head] % worth.shape[1] + SINKS).tolist()) for head in (0, 1)]
    assert kept(fed) == [[*range(SINKS), *own, N - 1] for own in expected]
    assert len(expected[0]) > len(expected[1])


def test_a_later_turn_is_judged_by_its_own_queries_where_heads_hold_different_numbers():
    fed = Fed(f"{JOINT}, safeguard=0.0)", n=N + 20)
    fed.value[:, 0] *= 1.3
    fed.feed(N)
    before = kept(fed)
    fed.feed(20)
    mean_turn = torch.stack([matrix(fed, N + 20 + i) for i in range(FUTURE)]).mean(0).double()
    keys, places, values = fed.rotated(fed.key, 0, N + 20)[0].double(), [], []
    for head, lane in enumerate(before):
        held = [*lane, *range(N, N + 20)]
        worth = torch.zeros(len(held) - SINKS, dtype=torch.float64)
        for queries in fed.query[0, 2 * head : 2 * head + 2, N:].double():
            mu, sigma = mean_turn @ queries.mean(0), mean_turn @ torch.cov(queries.T, correction=0) @ mean_turn.T
            key = keys[head, held[SINKS:]]
            z = key @ mu / DIM**0.5 + 0.5 * torch.einsum("nd,de,ne->n", key, sigma, key) / DIM
            worth += z.softmax(0) / 2
        places.append(held[SINKS:-1])
        values.append((worth * fed.value[0, head, held[SINKS:]].double().norm(dim=-1))[:-1])
    chosen = torch.cat(values).topk(2 * (BUDGET - SINKS - 1)).indices.tolist()
    first = len(places[0])
    expected = [
        sorted(places[0][i] for i in chosen if i < first),
        sorted(places[1][i - first] for i in chosen if i >= first),
    ]
    assert kept(fed) == [[*range(SINKS), *own, N + 19] for own in expected]


def test_what_is_generated_stays():
    fed = Fed(f"{SPEC})")
    fed.feed(48)
    expected = [[*lane, *range(48, N)] for lane in slow(fed, 48)]
    for _ in range(48, N):
        fed.feed(1)
    assert kept(fed) == expected


def test_the_expected_attention_is_that_of_queries_drawn_from_the_distribution():
    torch.manual_seed(0)
    queries, keys = torch.randn(1, 300, 4) @ torch.randn(4, 4) * 0.5 + 1, torch.randn(50, 4) / 2
    found = Gaussian.of(queries, 300, 0.5)
    mean, covariance = found.mean, found.spread / found.count
    drawn = torch.distributions.MultivariateNormal(mean[0].double(), covariance[0].double()).sample((400_000,))
    sampled = (drawn @ keys.double().T * 0.5).exp().mean(0).log().float()
    torch.testing.assert_close(
        log_expected(keys[None], mean[None], covariance[None], 0.5)[0, 0], sampled, atol=0.02, rtol=0
    )
    assert (log_expected(keys[None], mean[None], None, 0.5)[0, 0] - sampled).abs().max() > 0.1


def test_equal_queries_and_one_position_ahead_give_the_attention_of_that_query():
    fed = Fed(f"expectedattention(budget={BUDGET}, sinks=0, future=1, values=False, safeguard=1)", heads=2)
    fed.query = fed.query[:, :, :1].expand(-1, -1, N, -1).clone()
    fed.feed(N)
    query, key = matrix(fed, N) @ fed.query[0, :, 0, :, None], fed.rotated(fed.key, 0, N)[0]
    best = (key @ query)[:, : N - 1, 0].topk(BUDGET - 1).indices
    assert kept(fed) == [[*sorted(head.tolist()), N - 1] for head in best]


def test_statistics_are_of_queries_after_their_norm_and_before_rotation():
    net, seen = tiny.model("qwen3"), []
    cache, tokens = tiny.cache(net, f"{SPEC})"), tiny.ids(1, 40)
    hook = net.model.layers[1].self_attn.q_norm.register_forward_hook(lambda *call: seen.append(call[-1]))
    cache.expect(N)
    tiny.feed(net, cache, tokens)
    hook.remove()
    queries = seen[-1][0, SINKS:]
    (found,) = cache.managed[1].record.memory.rows[0]
    torch.testing.assert_close(found.mean, queries.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.spread[0] / found.count, torch.cov(queries[:, 0].T, correction=0))


def test_parts_add_up_to_the_whole():
    queries = torch.randn(2, 40, 8) + 30
    whole = Gaussian.of(queries, 40, 1.0)
    parts = Gaussian.of(queries[:, :7], 7, 1.0) + Gaussian.of(queries[:, 7:], 40, 1.0)
    assert (parts.count, parts.stop) == (40, 40)
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.spread, whole.spread, atol=1e-3, rtol=1e-4)


def test_keys_held_without_rotation_are_judged_alike():
    fed, raw = Fed(f"{SPEC}, per_head=False)"), Fed(f"{SPEC}, per_head=False) | tokenselect(top_k=500)")
    raw.query, raw.key, raw.value = fed.query, fed.key, fed.value
    for each in (fed, raw):
        each.feed(40, prompt_left=24)
        each.feed(24)
    assert kept(raw) == kept(fed)


@pytest.mark.parametrize("piece", [7, 16])
def test_long_texts_are_judged_piece_by_piece(monkeypatch, piece):
    monkeypatch.setattr(expected, "_TOKENS_HELD", piece)
    test_kept_tokens_equal_the_published_lines(4, 2, True, {})


def _counts_sinks(monkeypatch):
    observe = ExpectedQueries.observe
    monkeypatch.setattr(
        ExpectedQueries, "observe", lambda self, seen, memory: observe(replace(self, sinks=0), seen, memory)
    )


def _turns_by_the_last_position(monkeypatch):
    moments = Gaussian.future_moments
    monkeypatch.setattr(Gaussian, "future_moments", lambda self, rope, first, n: moments(self, rope, first + n - 1, 1))


def _does_not_turn(monkeypatch):
    monkeypatch.setattr(Gaussian, "future_moments", lambda self, rope, first, n: (self.mean, self.spread / self.count))


def _scales_too_little(monkeypatch):
    # By the root of the size where the size itself is due.
    moments = Gaussian.future_moments
    monkeypatch.setattr(
        Gaussian, "future_moments", lambda self, *place: (moments(self, *place)[0], moments(self, *place)[1] * DIM**0.5)
    )


@pytest.mark.parametrize("fault", [_counts_sinks, _turns_by_the_last_position, _does_not_turn, _scales_too_little])
def test_a_rule_switched_off_shows(monkeypatch, fault):
    torch.manual_seed(3)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        test_kept_tokens_equal_the_published_lines(6, 1, True, {})


def test_covering_everything_equals_dense():
    expected = tiny.generate(tiny.model(), tiny.ids(2, N)).sequences
    net = tiny.model()
    found = tiny.generate(net, tiny.ids(2, N), tiny.cache(net, "expectedattention(budget=100)")).sequences
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("expectedattention(budget=4)", "budget must exceed the 4 sinks and the window of 1"),
        ("expectedattention(future=0)", "future must be a whole number"),
        ("expectedattention(epsilon=-1)", "epsilon must be a finite number"),
        ("expectedattention(covariance=1)", "covariance must be True or False"),
        ("expectedattention(safeguard=2)", "safeguard must be a share"),
        ("expectedattention(sinks=-1)", "sinks must be a whole number"),
        ("expectedattention | tokenselect", "differ from head to head"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)
