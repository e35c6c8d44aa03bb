"""ActQKV: the proofs of its card (arXiv 2502.13542)."""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from kvote import MethodError
from kvote.methods import actqkv
from kvote.read.far_blocks import FarBlocks
from kvote.read.probed import Habit, Probed
from kvote.read.probed_blocks import ProbedBlocks

FRAME = "block=4, sinks=3, window=10, representatives=2, chunk=6"
SPEC = f"actqkv({FRAME}, top_k=2, least=1, warm=3)"
N = 60


def window(m: int = 6, channels: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(m, channels, generator=torch.Generator().manual_seed(seed))


def test_the_more_unusual_a_query_is_the_more_it_weighs():
    usual, asked = Habit.of(window(50)), window(seed=1)
    last = 0.0
    for size in (1.0, 2.0, 4.0, 8.0):
        asked[2, 5] = 3.0 * size
        weights = usual.weights(asked)
        assert float(weights.sum()) == pytest.approx(1)
        assert weights[2] > last
        last = float(weights[2])


def test_a_channel_in_which_queries_always_vary_makes_none_unusual():
    loud = window(50)
    loud[:, 0] *= 100
    habit, asked = Habit.of(loud), window(seed=1)
    before = habit.weights(asked)
    asked[2, 0] += 20
    assert habit.weights(asked)[2] < 1.2 * before[2]


def test_what_is_usual_follows_the_published_formula():
    first, second = window(), window(4, seed=1) + 1
    habit = Habit.of(first)
    torch.testing.assert_close(habit.variance, first.var(0))
    mean, count, m = second.mean(0), 1, 4
    new = habit.variance * (count - 1 / m) + second.var(0, correction=0) + (mean - habit.mean) ** 2 / (1 + 1 / count)
    met = habit.met(second)
    torch.testing.assert_close(met.variance, new / (count + 1 - 1 / m))
    torch.testing.assert_close(met.mean, (habit.mean + mean) / 2)
    assert met.count == 2


@pytest.mark.parametrize("layers", [4, 32])
def test_a_probe_is_the_mean_until_so_many_windows_passed_in_all_layers(layers):
    reader, habit, asked = actqkv(ramp=40).read, Habit.of(window(50)), window(seed=1)
    for seed in range(12):
        plain = torch.equal(reader._probe(SimpleNamespace(memories=[None] * layers), habit, asked), asked.mean(0))
        assert plain == (habit.count * layers < 40)
        habit = habit.met(window(seed=seed))


def shared(entropies: list[float], top_k: int = 20, blocks: int = 1000, decode: bool = True) -> list[int]:
    """How many blocks the layers of one step read."""
    reader = actqkv(top_k=top_k, least=1, warm=3).read
    memories = [Probed(0, 1) for _ in entropies]
    for memory, each in zip(memories, entropies, strict=True):
        memory.habits[0] = Habit(torch.zeros(1), torch.zeros(1), 1, torch.full((3,), each))
    counts = []
    for number, memory in enumerate(memories):
        reading = SimpleNamespace(decode=decode, number=number, memories=memories)
        counts.append(reader._count_of(reading, 0, blocks))
        old = memory.habits[0]
        memory.habits[0] = Habit(old.mean, old.variance, old.count, old.entropies, counts[-1])
    return counts


def test_layers_share_the_blocks_of_all_by_their_entropies():
    assert shared([0.5] * 5) == [20] * 5
    assert sum(shared([0.9, 0.5, 0.7, 0.6])) == 80
    assert shared([0.8, 0.4]) == [27, 13]
    # A prompt does not look at them, and no layer reads more than twice its part, or more blocks than there are.
    assert shared([0.8, 0.4], decode=False) == [20, 20]
    assert shared([0.9, 0.1, 0.1])[0] == 40
    assert shared([0.8, 0.4], blocks=15) == [15, 15]


def logits(spec: str, tokens: Tensor) -> tuple[Any, Tensor]:
    net = tiny.model()
    cache = tiny.cache(net, spec)
    return cache, torch.cat([tiny.feed(net, cache, tokens[:, :50]), tiny.feed(net, cache, tokens[:, 50:], passes=1)], 1)


def test_no_fewer_than_the_least_are_read():
    tokens = tiny.ids(1, N)
    _, all_blocks = logits(f"infllm({FRAME}, top_k=50)", tokens)
    for least, same in ((50, True), (1, False)):
        _, got = logits(SPEC.replace("least=1", f"least={least}"), tokens)
        assert torch.allclose(got, all_blocks, atol=1e-4) == same


def test_blocks_are_those_most_like_the_mean_by_cosine(monkeypatch):
    best = ProbedBlocks._best
    alike: list[bool] = []

    def checked(self: ProbedBlocks, reading: Any, memory: Probed, row: int, stop: int) -> Tensor:
        got = best(self, reading, memory, row, stop)
        mean = self._far_queries(reading, row, stop)[0].mean(1)
        keys = memory.held[0].keys.float()
        cosine = torch.stack([torch.cosine_similarity(mean.flatten(), key.flatten(), dim=0) for key in keys])
        assert got[0].tolist() == sorted(cosine.topk(min(2, len(keys))).indices.tolist())
        alike.append(torch.equal(got, FarBlocks._best(self, reading, memory, row, stop)))
        return got

    monkeypatch.setattr(ProbedBlocks, "_best", checked)
    logits(SPEC.replace("warm=3", "warm=1000"), tiny.ids(1, N))
    # By the product itself, as in infllm, it would not always be the same.
    assert not all(alike)


def test_queries_that_are_unusual_choose_other_blocks():
    tokens = tiny.ids(1, N)
    _, mean = logits(SPEC, tokens)
    _, probed = logits(SPEC.replace("warm=3", "warm=3, ramp=0"), tokens)
    assert not torch.allclose(mean, probed, atol=1e-3)


def test_an_announced_rollback_leaves_no_trace():
    spec = SPEC.replace("chunk=6", "chunk=1")
    cache, _ = logits(spec, tiny.ids(1, N))
    fresh, _ = logits(spec, tiny.ids(1, N))
    net, more = tiny.model(), tiny.ids(1, 4, seed=3)
    cache.activate_past_recording()
    tiny.feed(net, cache, tiny.ids(1, 6, seed=2))
    cache.crop(-6)
    for mine, other in zip(cache.managed, fresh.managed, strict=True):
        assert mine.memory.habits[0].count == other.memory.habits[0].count
        torch.testing.assert_close(mine.memory.habits[0].mean, other.memory.habits[0].mean)
    torch.testing.assert_close(*(tiny.feed(net, each, more, passes=1) for each in (cache, fresh)))


@pytest.mark.parametrize(("name", "least"), [("least", 1), ("warm", 1), ("ramp", 0), ("block", 1)])
def test_parameters_that_make_no_sense_are_refused(name, least):
    with pytest.raises(MethodError, match=f"{name} must be a whole number of at least {least}; got -1"):
        actqkv(**{name: -1})
