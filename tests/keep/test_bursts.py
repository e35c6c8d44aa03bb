"""Generated tokens are let go of in bursts: what is held stays within the budget, and is rewritten once per burst."""

from typing import Any

import pytest
import scored
import tiny
import torch
from selecting import Fed

from kvote import CropError, Method, MethodError
from kvote.keep.budget import Budget, after_burst
from kvote.keep.evict import sinks_and_recent
from kvote.keep.merge.means import recent_and_mean
from kvote.layer import Layer
from kvote.spec import parse


@pytest.mark.parametrize(
    ("most", "burst", "expected"),
    [
        (127, None, 127),
        (128, None, 127),
        (256, None, 253),
        (4096, None, 4033),
        (100_000, None, 99_937),
        (100_000, 1, 100_000),
        (100, 64, 37),
        (10, 64, 1),
        (1, None, 1),
        (0, None, 0),
        (0, 64, 0),
    ],
)
def test_what_is_left_for_a_burst(most, burst, expected):
    assert after_burst(most, burst) == expected


def fed_with(method: str | Method, n: int) -> Fed:
    fed = Fed("dense", 2, 2, n=n)
    fed.layer = Layer(0, parse(method) if isinstance(method, str) else method, fed.rope)
    return fed


class Watched:
    """How often the tokens of a layer were rewritten."""

    def __init__(self, fed: Fed) -> None:
        self.rewrites, segment = 0, fed.layer.segment
        keep = segment.keep

        def counted(*args: Any) -> None:
            self.rewrites += 1
            keep(*args)

        segment.keep = counted


# What is held at most, and the burst.
KEEPERS: dict[str, tuple[str | Method, int, int]] = {
    "h2o, small": ("h2o(budget=127)", 127, 1),
    "h2o, two": ("h2o(budget=128)", 128, 2),
    "h2o": ("h2o(budget=256)", 256, 4),
    "h2o, one list": ("h2o(budget=256, per_head=False)", 256, 4),
    "h2o, step by step": ("h2o(budget=256, burst=1)", 256, 1),
    "h2o, told": ("h2o(budget=20, burst=7)", 20, 7),
    "h2o, a page": ("h2o(budget=5000)", 5000, 64),
    "mikv": ("mikv(budget=256)", 256, 4),
    "cake": ("cake(budget=264, window=8)", 264, 4),
    "cake, large window": ("cake(budget=264, window=200)", 264, 1),
    "streamingllm": ("streamingllm(sinks=4, window=256)", 260, 4),
    "streamingllm, small window": ("streamingllm(sinks=256, window=20)", 276, 1),
    "sinks and recent": (Method(keep=sinks_and_recent(64, 256)), 320, 4),
    "recent and a mean": (Method(keep=recent_and_mean(Budget(260), 4)), 260, 4),
    "recent alone": (Method(keep=recent_and_mean(Budget(260), 4, compensation=False, burst=3)), 260, 3),
}


@pytest.mark.parametrize(("method", "most", "burst"), KEEPERS.values(), ids=KEEPERS)
def test_a_prompt_ends_at_the_budget_and_generated_tokens_rewrite_once_per_burst(method, most, burst):
    steps = 2 * burst + 3
    fed = fed_with(method, most + 10 + steps)
    fed.feed(most + 10)
    assert fed.layer.segment.length(0) == most
    watched, held = Watched(fed), []
    for step in range(steps):
        fed.feed(1)
        held.append(fed.layer.segment.length(0))
        assert watched.rewrites == step // burst + 1
    assert held == [most - burst + 1 + step % burst for step in range(steps)]
    last = fed.at - 1
    assert all(lane[-1] == last for lane in fed.layer.segment.positions(0))


@pytest.mark.parametrize(("method", "most", "burst"), KEEPERS.values(), ids=KEEPERS)
def test_a_later_prompt_ends_at_the_budget_again(method, most, burst):
    fed = fed_with(method, most + 90)
    for count in (most + 10, 1, 70):
        fed.feed(count)
    assert fed.layer.segment.length(0) == most


def test_without_a_prompt_nothing_goes_before_the_budget_is_full():
    fed = fed_with("h2o(budget=20, burst=4)", 40)
    held = []
    for _ in range(40):
        fed.feed(1)
        held.append(fed.layer.segment.length(0))
    assert held == [*range(1, 21), *([17, 18, 19, 20] * 5)]


def test_tokens_generated_several_at_a_time_go_in_bursts():
    fed = fed_with("h2o(budget=256)", 300)
    fed.feed(260)
    held = []
    for _ in range(6):
        fed.feed(3, prompt_left=None)
        held.append(fed.layer.segment.length(0))
    assert held == [253, 256] * 3


@pytest.mark.parametrize("spec", ["h2o(budget=0.5)", "mikv(budget=0.5)"])
def test_a_share_that_grows_with_the_text_is_never_exceeded(spec):
    fed = fed_with(spec, 500)
    fed.feed(400)
    watched, length, rewrites = Watched(fed), 200, 0
    for seen in range(401, 501):
        fed.feed(1)
        length += 1
        if length > seen // 2:
            length, rewrites = seen // 2 - seen // 128 + 1, rewrites + 1
        assert fed.layer.segment.length(0) == length
        assert watched.rewrites == rewrites
    # Half as many tokens as steps have to go, three at a time.
    assert 14 <= rewrites <= 18


def test_the_mean_is_of_all_that_was_dropped_in_bursts():
    fed = fed_with(Method(keep=recent_and_mean(Budget(20), 2, burst=6)), 60)
    fed.feed(30)
    for _ in range(30):
        fed.feed(1)
        gone = fed.at - fed.layer.segment.length(0)
        mean = fed.layer.record.memory.rows[0]
        assert mean.count == gone
        torch.testing.assert_close(mean.key, fed.rotated(fed.key, 2, 2 + gone)[0].mean(1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mean.value, fed.value[0, :, 2 : 2 + gone].mean(1), atol=1e-5, rtol=1e-4)


SPECS = {
    "h2o": "h2o(budget=20, burst=4)",
    "mikv": "mikv(budget=20, burst=4)",
    "cake": "cake(budget=20, window=6, burst=4)",
    "streamingllm": "streamingllm(sinks=2, window=18, burst=4)",
    "duoattention": "duoattention(heads='{duo}', sinks=2, window=18, burst=4)",
    "razorattention": "razorattention(heads='{razor}', induction=0.5, budget=20, sinks=2, burst=4)",
}
SCORES = [[0.1, 0.9], [0.8, 0.2]]


@pytest.fixture
def net():
    return tiny.model()


@pytest.fixture(params=SPECS.values(), ids=SPECS)
def spec(request, net):
    files = {"{razor}": scored.file(scored.razor(net, SCORES)), "{duo}": scored.file(scored.duo(net, SCORES))}
    made = request.param
    for name, file in files.items():
        made = made.replace(name, file)
    return made


def lanes(cache: Any, row: int) -> list[list[int]]:
    return [lane.tolist() for layer in range(2) for lane in cache.positions(layer)[row]]


def test_rows_let_go_each_at_its_own_time_as_if_they_were_alone(net, spec):
    """One row exceeds the budget from the prompt on, one while generating, one never."""
    pads = [0, 23, 38]
    tokens, mask = tiny.padded(3, 40, pads)
    extra = tiny.ids(3, 10, seed=3)
    mask = torch.cat([mask, torch.ones(3, 10, dtype=torch.long)], dim=1)
    cache = tiny.cache(net, spec)
    tiny.feed(net, cache, tokens, mask)
    got = tiny.feed(net, cache, extra, mask, passes=1)
    fewest = [min(map(len, lanes(cache, row))) for row in range(3)]
    assert fewest[2] == 12
    assert len(set(fewest)) == 3
    for row, pad in enumerate(pads):
        alone = tiny.cache(net, spec)
        tiny.feed(net, alone, tokens[row : row + 1, pad:])
        expected = tiny.feed(net, alone, extra[row : row + 1], passes=1)
        torch.testing.assert_close(got[row : row + 1], expected, atol=1e-4, rtol=1e-4)
        assert lanes(cache, row) == lanes(alone, 0)


def test_drafts_that_are_rolled_back_leave_no_more_than_the_budget(net, spec):
    cache = tiny.cache(net, spec)
    cache.activate_past_recording()
    tiny.feed(net, cache, tiny.ids(1, 40))
    cache.crop(-2)
    held = []
    for seed in range(6):
        tiny.feed(net, cache, tiny.ids(1, 5, seed))
        cache.crop(-3)
        # Of the heads that do not keep everything; layers may share a budget.
        held.append(sum(min(map(len, cache.positions(layer)[0])) for layer in range(2)))
    assert cache.get_seq_length() == 50
    # Two more than the budget make room for a burst of 4: 17 in a layer, and two more fit.
    assert held == [34, 38] * 3


@pytest.mark.parametrize("name", ["streamingllm", "duoattention", "razorattention"])
def test_between_bursts_the_latest_tokens_can_be_rolled_back(net, name):
    made = SPECS[name].replace("{razor}", scored.file(scored.razor(net, SCORES)))
    made = made.replace("{duo}", scored.file(scored.duo(net, SCORES)))
    cache, fresh = (tiny.cache(net, made) for _ in range(2))
    for each in (cache, fresh):
        tiny.feed(net, each, tiny.ids(1, 40))
        # The first one lets others go.
        tiny.feed(net, each, tiny.ids(1, 1, seed=1))
    tiny.feed(net, cache, tiny.ids(1, 2, seed=2), passes=1)
    with pytest.raises(CropError, match="has dropped tokens"):
        cache.crop(-3)
    cache.crop(-2)
    got, expected = (tiny.feed(net, each, tiny.ids(1, 9, seed=3), passes=1) for each in (cache, fresh))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert lanes(cache, 0) == lanes(fresh, 0)


def test_step_by_step_no_generated_token_can_be_rolled_back(net):
    cache = tiny.cache(net, "streamingllm(sinks=2, window=18, burst=1)")
    tiny.feed(net, cache, tiny.ids(1, 40))
    tiny.feed(net, cache, tiny.ids(1, 3, seed=1), passes=1)
    with pytest.raises(CropError, match="has dropped tokens"):
        cache.crop(-1)


@pytest.mark.parametrize("value", [0, -1, 65, 1.5, "'many'", True])
@pytest.mark.parametrize("name", SPECS)
def test_a_burst_that_makes_no_sense_is_refused_in_one_sentence(net, name, value):
    made = SPECS[name].replace("{razor}", scored.file(scored.razor(net, SCORES)))
    made = made.replace("{duo}", scored.file(scored.duo(net, SCORES))).replace("burst=4", f"burst={value}")
    with pytest.raises(MethodError, match=r"^burst must be a whole number of tokens from 1 to 64, or None; got .*\.$"):
        parse(made)
