"""PrefixKV: the proofs of its card (arXiv 2412.03409)."""

import math

import pytest
import tiny
import torch

from kvote import MethodError
from kvote.keep.allocate import same_share
from kvote.keep.allocate.same_share import SameShare, forgotten, prefix
from kvote.keep.score.prompt_attention import PromptAttention, PromptMass
from kvote.spec import parse

N, LAYERS = 100, 4


def model():
    return tiny.model(num_hidden_layers=LAYERS)


def worth_of(tokens: torch.Tensor) -> list[torch.Tensor]:
    """Column sums of the attention that the model's own code computes, over all heads."""
    net = tiny.model(native="eager", num_hidden_layers=LAYERS)
    with torch.no_grad():
        maps = net(tokens, output_attentions=True).attentions
    return [layer[0].double().sum(dim=(0, 1)) for layer in maps]


def slow(worth: list[torch.Tensor], ratio: float, protect: int = 2) -> list[int]:
    """The published lines: how many tokens each layer forgets."""
    n, low, high = len(worth[0]), 0.0, 1.0
    total = n * len(worth) - int((1 - ratio) * n) * len(worth)
    shares = [sorted((part / part.sum()).tolist(), reverse=True) for part in worth]
    while True:
        share, goes = (low + high) / 2, []
        for part in shares:
            mass, kept = 0.0, 0
            while mass < share and kept < n:
                mass, kept = mass + part[kept], kept + 1
            goes.append(max(0, n - max(kept, 1) - protect))
        if abs(sum(goes) - total) < 5:
            return [int(gone * total / sum(goes)) for gone in goes]
        low, high = (share, high) if sum(goes) > total else (low, share)


def kept(cache) -> list[list[int]]:
    """By layer, what all its heads hold."""
    found = []
    for layer in range(LAYERS):
        one, *others = [lane.tolist() for lane in cache.positions(layer)[0]]
        assert all(other == one for other in others)
        found.append(one)
    return found


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.75])
@pytest.mark.parametrize("passes", [0, 13])
def test_kept_tokens_equal_the_published_lines(ratio, passes):
    tokens = tiny.ids(1, N)
    worth = worth_of(tokens)
    net = model()
    cache = tiny.cache(net, f"prefixkv(budget={1 - ratio})")
    cache.expect(N)
    tiny.feed(net, cache, tokens, passes=passes)
    goes = slow(worth, ratio)
    assert len(set(goes)) > 1
    for lane, part, gone in zip(kept(cache), worth, goes, strict=True):
        lowest = part[1:-1].argsort()[:gone] + 1
        assert lane == sorted(set(range(N)) - set(lowest.tolist()))
        assert lane[0] == 0
        assert lane[-1] == N - 1


def curves(*steepness: float, n: int = 200) -> list[torch.Tensor]:
    return [torch.exp(-k * torch.arange(n) / n)[torch.randperm(n)] for k in steepness]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_each_layer_keeps_the_fewest_tokens_with_one_share_and_together_the_budget(share):
    worth = curves(0.0, 2.0, 4.0, 8.0)
    total = round(4 * 200 * (1 - share))
    goes = forgotten(worth, total, 2)
    assert total - 4 <= sum(goes) <= total
    shares = [part.double().sort(descending=True).values.cumsum(0) / part.double().sum() for part in worth]
    # Scaling moves what goes by a token or two.
    apart = [
        max(abs(max(0, 200 - int((part < at).sum()) - 1 - 2) - gone) for part, gone in zip(shares, goes, strict=True))
        for at in torch.linspace(0, 1, 5001).tolist()
    ]
    assert min(apart) <= 2


def test_equal_layers_keep_equally_many_and_peaked_ones_fewer():
    worth = curves(3.0)[0]
    assert len(set(forgotten([worth, worth.flip(0), worth], 300, 2))) == 1
    goes = forgotten(curves(0.0, 1.0, 3.0, 9.0, 27.0), 500, 2)
    assert goes == sorted(goes)
    assert goes[0] < goes[-1]


def test_a_prefix_is_the_fewest_that_have_the_share():
    sums = torch.tensor([0.5, 0.8, 1.0]).double()
    assert [prefix(sums, share) for share in (0.0, 0.5, 0.51, 0.8, 0.9, 1.0)] == [1, 1, 2, 2, 3, 3]
    assert forgotten([torch.ones(5)], 0, 2) == [0]


@pytest.mark.parametrize("budget", [0.5, 50])
def test_generated_tokens_make_the_one_at_a_fixed_place_go(budget):
    net = model()
    cache = tiny.cache(net, f"prefixkv(budget={budget})")
    tiny.feed(net, cache, tiny.ids(1, N))
    ends = [len(lane) for lane in kept(cache)]
    for n in range(N + 1, N + 41):
        before = kept(cache)
        tiny.feed(net, cache, tiny.ids(1, 1, seed=n))
        for old, new, end in zip(before, kept(cache), ends, strict=True):
            allowed = math.ceil(n * end / N - 1e-9) if isinstance(budget, float) else end
            place = end - 25 if end > 25 else end // 2
            whole = [*old, n - 1]
            assert len(new) == allowed
            assert new == (whole if len(whole) <= allowed else whole[:place] + whole[place + 1 :])


def test_a_budget_that_covers_the_text_is_dense_attention():
    net = model()
    got = tiny.generate(net, tiny.ids(2, 40), tiny.cache(net, "prefixkv(budget=48)"))
    expected = tiny.generate(model(), tiny.ids(2, 40))
    assert torch.equal(got.sequences, expected.sequences)


def test_rows_of_a_batch_are_divided_each_by_itself():
    net = model()
    tokens, mask = tiny.padded(3, 60, [0, 25, 7])
    cache = tiny.cache(net, "prefixkv(budget=0.4)")
    tiny.feed(net, cache, tokens, mask)
    for row, pads in enumerate([0, 25, 7]):
        alone = tiny.cache(net, "prefixkv(budget=0.4)")
        tiny.feed(net, alone, tokens[row : row + 1, pads:])
        for layer in range(LAYERS):
            assert [x.tolist() for x in cache.positions(layer)[row]] == [x.tolist() for x in alone.positions(layer)[0]]


def last_queries(self: PromptAttention, seen, memory: PromptMass) -> None:
    """The fault: attention from the last queries alone."""
    for row, mass in zip(seen.rows, self.shared(seen.mass(max(0, seen.count - 5))), strict=True):
        memory.add(row, mass)


FAULTS = {
    "even layers": (SameShare, "tokens", lambda self, held, memory, mean: mean),
    "the last queries": (PromptAttention, "observe", last_queries),
    "a share each": (same_share, "prefix", lambda sums, share: int(share * len(sums)) + 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(monkeypatch, fault):
    monkeypatch.setattr(*FAULTS[fault])
    with pytest.raises((AssertionError, RuntimeError)):
        test_kept_tokens_equal_the_published_lines(0.5, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prefixkv(budget=0)", "budget must be"),
        ("prefixkv(sinks=-1)", "sinks must be a whole number"),
        ("prefixkv(distance=0)", "distance must be a whole number"),
        ("prefixkv | h2o", "both decide what to keep"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)
