"""CRITIC: the proofs of its card (arXiv 2504.01281)."""

import pytest
import tiny
import torch
from selecting import DIM, Fed

from kvote import MethodError
from kvote.keep.allocate.memory_pressure import MemoryPressure
from kvote.keep.score import hybrid
from kvote.keep.score.hybrid import Hybrid, gradient_norms
from kvote.keep.score.hybrid_memory import HybridMemory
from kvote.spec import parse

SPEC = "critic(budget=16, burst=1"


def min_max(x: torch.Tensor) -> torch.Tensor:
    return (x - x.min()) / (x.max() - x.min())


def slow(fed: Fed, passes: list[int], weights: tuple[float, float, float]) -> list[list[int]]:
    """The text query by query, in float64, with gradients by autograd: after each pass, what the layer holds."""
    heads, n = fed.query.shape[1], fed.key.shape[2]
    groups = heads // fed.key.shape[1]
    query, key = (fed.rotated(x, 0, n)[0].double() for x in (fed.query, fed.key))
    value = fed.value[0].double()
    held: list[int] = []
    received, entropy = torch.zeros(n).double(), torch.zeros(n).double()
    history, at, before, answer = [], 0, None, None
    for count in passes:
        for token in range(at, at + count):
            held.append(token)
            k, v = key[:, held].clone().requires_grad_(), value[:, held].clone().requires_grad_()
            full = [x.repeat_interleave(groups, 0) for x in (k, v)]
            share = torch.softmax((full[0] @ query[:, token, :, None])[..., 0] * DIM**-0.5, dim=-1)
            before, answer = answer, torch.einsum("hn,hnd->hd", share, full[1])
            received[held] += share.detach().sum(0)
            entropy[token] = -(share * torch.log(share + 1e-9)).sum(-1).mean().detach()
        at += count
        parts = list(zip(weights, [received[held], entropy[held]], strict=False))
        if before is not None:
            loss = (answer - before.detach()).square().mean()
            grads = torch.autograd.grad(loss, (k, v))
            parts.append((weights[2], sum(g.abs().sum((0, 2)) for g in grads)))
            answer = answer.detach()
        if len(held) > 16:
            worth = sum(w * min_max(part) for w, part in parts)
            best = worth[:-1].argsort(descending=True, stable=True)[:15].tolist()
            held = sorted(held[i] for i in (*best, len(held) - 1))
        history.append(list(held))
    return history


def kept(fed: Fed) -> list[list[int]]:
    return [lane.tolist() for lane in fed.layer.segment.positions(0)]


PASSES = [30] + [1] * 20


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2)])
@pytest.mark.parametrize("weights", [(0.5, 0.2, 0.3), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("passes", [PASSES, [1] * 40], ids=["prompt and decode", "decode alone"])
def test_kept_tokens_equal_the_text_with_autograd_after_every_step(heads, kv_heads, weights, passes):
    attention, entropy, gradient = weights
    fed = Fed(f"{SPEC}, attention={attention}, entropy={entropy}, gradient={gradient})", heads, kv_heads)
    for step, expected in enumerate(slow(fed, passes, weights)):
        fed.feed(passes[step])
        assert kept(fed) == [expected] * kv_heads, step


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradient_norms_equal_autograd(softcap):
    query, before = torch.randn(4, 8).double(), torch.randn(4, 6).double()
    key, value = torch.randn(2, 11, 8).double().requires_grad_(), torch.randn(2, 11, 6).double().requires_grad_()
    logits = (key.repeat_interleave(2, 0) @ query[..., None])[..., 0] * 0.3
    slope = torch.full_like(logits, 0.3)
    if softcap is not None:
        slope = slope * (1 - (logits / softcap).tanh() ** 2)
        logits = softcap * (logits / softcap).tanh()
    paid = logits.softmax(-1)
    answer = torch.einsum("hn,hnd->hd", paid, value.repeat_interleave(2, 0))
    grads = torch.autograd.grad((answer - before).square().mean(), (key, value))
    expected = sum(g.abs().sum((0, 2)) for g in grads)
    with torch.no_grad():
        got = gradient_norms(paid, value, query, answer, before, slope)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_attention_alone_is_h2o_for_all_heads_together():
    critic, other = (
        Fed(f"{SPEC}, attention=1, entropy=0, gradient=0)"),
        Fed("h2o(budget=16, recent=0.01, per_head=False)"),
    )
    other.query, other.key = critic.query, critic.key
    for count in PASSES:
        critic.feed(count)
        other.feed(count)
        assert kept(critic) == kept(other)


def test_mixed_scores_go_from_0_to_1():
    fed = Fed("critic(budget=60)")
    fed.feed(40)
    score, memory = fed.layer.method.keep.score, fed.layer.record.memory

    class Row:
        row = 0

    worth = score.of(Row, memory, 40)
    assert worth.shape == (1, 40)
    assert float(worth.min()) == 0
    assert float(worth.max()) == 1
    assert torch.equal(hybrid.stretched(torch.ones(3)), torch.zeros(3))


@pytest.mark.parametrize("n", [5, 30, 31, 60, 101])
@pytest.mark.parametrize("r", [0.1, 0.29, 0.5])
@pytest.mark.parametrize("least", [1, 30, 80])
@pytest.mark.parametrize("memory", ["", ", memory='1GiB', alpha=0"])
def test_as_many_stay_as_the_text_says_in_the_texts_order(n, r, least, memory):
    net = tiny.model()
    cache = tiny.cache(net, f"critic(budget={1 - r}, least={least}{memory})")
    tiny.feed(net, cache, tiny.ids(1, n))
    expected = n if n <= least else min(max(least, 2, int((1 - r) * n + 1e-9)), n - 1)
    for layer in range(2):
        for lane in cache.positions(layer)[0]:
            assert lane.tolist() == sorted(lane.tolist())
            assert len(lane) == expected
            assert lane[-1] == n - 1


def test_the_share_that_goes_grows_with_the_memory_used_up_to_a_limit():
    pressed = MemoryPressure(goes=0.3, alpha=0.4, most=0.6, total=1000.0, least=1, always=1)
    assert [round(pressed.share(used), 6) for used in (0, 250, 500, 750, 5000)] == [0.3, 0.4, 0.5, 0.6, 0.6]
    net = tiny.model()
    held = []
    for memory in ("1MiB", "60KiB", "10KiB"):
        cache = tiny.cache(net, f"critic(budget=0.7, least=1, memory='{memory}')")
        tiny.feed(net, cache, tiny.ids(1, 100))
        held.append(len(cache.positions(0)[0][0]))
    # 100 tokens of two layers, two key heads, and 16 channels of four bytes are 50 KiB.
    assert held == [68, 45, 40]


def test_short_texts_are_dense_attention():
    net = tiny.model()
    got = tiny.generate(net, tiny.ids(2, 100), tiny.cache(net, "critic"), max_new_tokens=20)
    expected = tiny.generate(tiny.model(), tiny.ids(2, 100), max_new_tokens=20)
    assert torch.equal(got.sequences, expected.sequences)


def test_sinks_and_recent_tokens_stay_if_told_so():
    fed = Fed("critic(budget=24, sinks=4, recent=16)")
    fed.feed(60)
    lane = kept(fed)[0]
    assert len(lane) == 24
    assert lane[:4] + lane[-16:] == [*range(4), *range(44, 60)]


def rows(self: Hybrid, seen: object, memory: HybridMemory) -> None:
    """The fault: attention that a token paid."""
    for row in seen.rows:
        mass = seen.mass() * 0
        memory.add(row, mass.sum(1).expand(2, -1))


FAULTS = {
    "attention paid": (Hybrid, "observe", rows, (1, 0, 0)),
    "entropies not carried along": (HybridMemory, "keep", lambda self, row, slots: None, (0, 1, 0)),
    "not stretched": (hybrid, "stretched", lambda x: x, (0.5, 0.2, 0.3)),
    "gradients of values alone": (
        hybrid,
        "gradient_norms",
        lambda paid, value, query, answer, before, slope: gradient_norms(paid, value, query * 0, answer, before, slope),
        (0, 0, 1),
    ),
    "gradients against nothing": (
        hybrid,
        "gradient_norms",
        lambda paid, value, query, answer, before, slope: gradient_norms(paid, value, query, answer, before * 0, slope),
        (0, 0, 1),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(monkeypatch, fault):
    owner, name, broken, weights = FAULTS[fault]
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises((AssertionError, RuntimeError)):
        test_kept_tokens_equal_the_text_with_autograd_after_every_step(4, 2, weights, PASSES)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("critic(attention=0.9)", "add up to 1"),
        ("critic(attention=-0.5, entropy=1.2)", "add up to 1"),
        ("critic(least=0.5)", "least must be a whole number"),
        ("critic(memory=3)", "memory must be bytes"),
        ("critic(budget=200, memory='1GiB')", "memory must be bytes"),
        ("critic(memory='1GiB', alpha=2)", "alpha must be a share"),
        ("critic(burst=0)", "burst must be"),
        ("critic(recent=0)", "window must be a whole number"),
        ("critic | h2o", "both decide what to keep"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)
