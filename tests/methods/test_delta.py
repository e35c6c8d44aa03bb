"""DELTA: the proofs of its card (arXiv 2510.09883)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import masking
import pytest
import tiny
import torch
from masking import decoded
from torch import Tensor

from kvote import MethodError
from kvote.methods import delta
from kvote.spec import parse
from kvote.store.uncompressed import UncompressedSegment
from kvote.tokens import TokenSet

PROMPT, STEPS, PAGES, RECENT, PAGE = 86, 6, 6, 2, 4
SPEC = f"pages={PAGES}, recent={RECENT}, page={PAGE}"
run = partial(masking.run, prompt=PROMPT, steps=STEPS)
model = partial(masking.model, layers=6)


def strongest(logits: Tensor) -> Tensor:
    """What tokens [b, n] are worth by the paper."""
    return logits.softmax(-1).amax(1)


def published(full: tuple[int, ...], worth: Callable[[Tensor], Tensor] = strongest, recent: int = RECENT) -> Any:
    """The published rule as a mask, page by page; ``worth`` of another rule for its ablations."""
    held: dict[str, Tensor] = {}

    def mask(layer: int, logits: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
        if layer not in full:
            return held["mask"]
        if layer + 1 not in full:
            tokens, n = worth(logits[:, :, 0]), key.shape[2]
            seen = torch.zeros(len(tokens), 1, 1, n, dtype=torch.bool)
            for row, own in enumerate(tokens):
                pages = [(float(part.sum()), -i) for i, part in enumerate(own.split(PAGE))]
                last = range(len(pages) - recent, len(pages))
                best = sorted(pages[: len(pages) - recent], reverse=True)[: PAGES - recent]
                for i in [-i for _, i in best] + list(last):
                    seen[row, 0, 0, i * PAGE : (i + 1) * PAGE] = True
            held["mask"] = seen
        return None

    return mask


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("full", [(0,), (0, 1, 2), (0, 3), (0, 2, 3)])
def test_logits_are_those_of_the_published_mask(groups, full):
    net = model(groups=groups)
    expected = decoded(net, tiny.ids(2, PROMPT + STEPS), PROMPT, published(full))
    _, got = run(net, f"delta(full={full}, {SPEC})")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(run(net, "dense")[1], expected, atol=1e-2, rtol=1e-2)


OTHERS: dict[str, Any] = {
    "the mean of the heads": published((0, 2), lambda logits: logits.softmax(-1).mean(1)),
    "the largest logit": published((0, 2), lambda logits: logits.amax(1)),
    "no recent pages": published((0, 2), recent=0),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_other_rules_read_other_pages(other):
    net = model()
    expected = decoded(net, tiny.ids(2, PROMPT + STEPS), PROMPT, other)
    assert not torch.allclose(run(net, f"delta(full=(0, 2), {SPEC})")[1], expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("pages", [23, 64])
def test_a_budget_that_covers_everything_is_dense_attention_bit_by_bit(pages):
    net = model()
    cache, got = run(net, f"delta(full=(0, 2), pages={pages}, recent=2, page=4)")
    assert torch.equal(got, run(net, "dense")[1])
    assert all(layer.selections == 0 for layer in cache.report().layers)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[TokenSet]:
    seen: list[TokenSet] = []
    attend = UncompressedSegment.attend

    def spy(self: Any, queries: Any, rows: Any, tokens: Any, scaling: Any) -> Any:
        seen.append(tokens)
        return attend(self, queries, rows, tokens, scaling)

    monkeypatch.setattr(UncompressedSegment, "attend", spy)
    monkeypatch.setattr(UncompressedSegment, "step", lambda *_: None)
    return seen


def test_layers_between_two_that_choose_read_the_same_pages(reads):
    """Three choices a step, of 28 layers, and exactly so many pages each time."""
    net = tiny.model(num_hidden_layers=28, hidden_size=32, intermediate_size=32)
    cache, tokens = tiny.cache(net, f"delta({SPEC})"), tiny.ids(1, PROMPT + 2)
    tiny.feed(net, cache, tokens[:, :PROMPT])
    for at in range(PROMPT, PROMPT + 2):
        reads.clear()
        tiny.feed(net, cache, tokens[:, at : at + 1])
        n = at + 1
        lists = [read.index for read in reads]
        assert [i for i, index in enumerate(lists) if index == range(n)] == [0, 1, 2, 14, 22]
        for start, stop in ((3, 14), (15, 22), (23, 28)):
            first = lists[start]
            assert all(torch.equal(each, first) for each in lists[start:stop])
            chosen = sorted(set((first.flatten() // PAGE).tolist()))
            assert len(chosen) == PAGES
            assert chosen[-RECENT:] == list(range(-(-n // PAGE) - RECENT, -(-n // PAGE)))
            assert first.flatten().tolist() == [t for p in chosen for t in range(p * PAGE, min(n, p * PAGE + PAGE))]
    layers = cache.report().layers
    assert [i for i, layer in enumerate(layers) if layer.selections] == [2, 14, 22]
    assert all(layer.selections in (0, 2) for layer in layers)


def test_the_report_says_what_is_read():
    layers = run(model(), f"delta(full=(0, 1, 3), {SPEC})")[0].report().layers
    n = PROMPT + STEPS
    assert [layer.tokens_read for layer in layers] == [n, n, PAGES * PAGE, n, PAGES * PAGE, PAGES * PAGE]
    assert [layer.selections for layer in layers] == [0, 2 * STEPS, 0, 2 * STEPS, 0, 0]


@pytest.mark.parametrize(
    ("layers", "full", "planners"),
    [(28, (0, 1, 2, 14, 22), (2, 14, 22)), (32, (0, 1, 2, 16, 25), (2, 16, 25)), (4, (0, 1, 2), (2,)), (2, (0,), (0,))],
)
def test_which_layers_read_everything(layers, full, planners):
    assert parse("delta").read.roles(layers) == (full, planners)


def test_prompts_and_turns_are_read_whole():
    net = model()
    cache, tokens = tiny.cache(net, f"delta(full=(0,), {SPEC})"), tiny.ids(1, 75)
    tiny.feed(net, cache, tokens[:, :50])
    tiny.feed(net, cache, tokens[:, 50:70])
    assert all(layer.selections == layer.reused == 0 for layer in cache.report().layers)
    tiny.feed(net, cache, tokens[:, 70:], passes=1)
    assert [layer.reused for layer in cache.report().layers] == [0, 5, 5, 5, 5, 5]


@pytest.mark.parametrize("full", [(0, 1, 2, 3, 4, 5), (0, 6)])
def test_a_model_without_such_layers_is_refused(full):
    with pytest.raises(MethodError, match="There are 6 layers with full attention, and full="):
        tiny.cache(model(), f"delta(full={full})")


def test_methods_whose_layers_or_heads_keep_different_tokens_are_refused():
    for keep in ("h2o", "snapkv"):
        with pytest.raises(MethodError, match="the reader takes"):
            parse(f"{keep} | delta")


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"pages": 0}, "pages must be a whole number of at least 1; got 0"),
        ({"recent": 0}, "recent must be a whole number of at least 1; got 0"),
        ({"page": 0}, "page must be a whole number of at least 1; got 0"),
        ({"pages": 4}, r"recent must be at most pages \(4\), of which it is a part; got 8"),
        ({"full": (1, 2)}, r"full must be a tuple of layers in ascending order, the first of them 0, .*got \(1, 2\)"),
        ({"full": (0, 2, 1)}, "full must be a tuple"),
        ({"full": 0}, "full must be a tuple"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters, sentence):
    with pytest.raises(MethodError, match=sentence):
        delta(**parameters)
