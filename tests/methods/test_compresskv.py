"""CompressKV: the proofs of its card (arXiv 2508.02401)."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import masking
import pytest
import scored
import tiny
import torch
from torch import Tensor

from kvote import Cache, InputError, MethodError
from kvote.calibration.needles import Needle, text_needles, world_needles
from kvote.calibration.semantic import measure_semantic, span_scores
from kvote.calibration.spans import best_heads, facts_of
from kvote.keep.allocate.importance import capacities
from kvote.keep.observation import Observation
from kvote.method import Method
from kvote.methods import compresskv

PROMPT, BUDGET, WINDOW = 80, 30, 6
# Of four query heads in four layers.
SPANS = [[0.1, 0.9, 0.3, 0.8], [0.5, 0.1, 0.6, 0.2], [0.0, 0.0, 0.4, 0.3], [0.9, 0.8, 0.7, 0.6]]
ERRORS = [0.4, 0.1, 0.2, 0.3]
SIZES = {"budget": BUDGET, "window": WINDOW, "least": 12, "most": 2}


def method(net: Any, first_k: int = 2, errors: list[float] = ERRORS, **changes: Any) -> Method:
    return compresskv(scored.semantic(net, SPANS, errors), first_k=first_k, **{**SIZES, **changes})


def held(cache: Cache) -> list[list[list[int]]]:
    """By layer and key head, the positions that the first sequence holds."""
    return [[at.tolist() for at in layer.segment.positions(0)] for layer in cache.managed]


def fed(net: Any, made: Method) -> Cache:
    cache = Cache(net, made)
    tiny.feed(net, cache, tiny.ids(1, PROMPT))
    return cache


def published(net: Any, heads: list[tuple[int, ...]], sizes: list[int]) -> list[list[int]]:
    """What each layer keeps, by transformers' own attention weights."""
    net.set_attn_implementation("eager")
    with torch.no_grad():
        attention = net(input_ids=tiny.ids(1, PROMPT), output_attentions=True).attentions
    net.set_attn_implementation("sdpa")
    kept = []
    for weights, chosen, size in zip(attention, heads, sizes, strict=True):
        votes = weights[0, list(chosen), -WINDOW:, : PROMPT - WINDOW].sum(1)
        worth = torch.nn.functional.avg_pool1d(votes, 5, 1, 2).mean(0)
        kept.append(sorted(worth.topk(size - WINDOW).indices.tolist()) + list(range(PROMPT - WINDOW, PROMPT)))
    return kept


def test_all_heads_of_a_layer_keep_what_its_best_heads_look_at():
    net = masking.model()
    cache = fed(net, method(net))
    sizes = list(capacities(tuple(ERRORS), BUDGET, 12, 2))
    kept = held(cache)
    assert cache.method.keep.offers.equal_heads
    # Generated tokens stay.
    tiny.feed(net, cache, tiny.ids(1, 5, seed=3), passes=1)
    assert [layer.segment.length(0) for layer in cache.managed] == [size + 5 for size in sizes]
    expected = published(net, [(1, 3), (0, 2), (2, 3), (0, 1)], sizes)
    assert kept == [[tokens, tokens] for tokens in expected]
    # Other heads keep other tokens.
    assert expected != published(net, [(0, 2), (1, 3), (0, 1), (2, 3)], sizes)


def test_the_queries_of_other_heads_change_nothing(monkeypatch):
    net = masking.model()
    before = held(fed(net, method(net)))
    chosen = {0: (1, 3), 1: (0, 2), 2: (2, 3), 3: (0, 1)}
    weights = Observation.weights

    def noisy(seen: Observation, start: int, stop: int) -> Tensor:
        found = weights(seen, start, stop)
        others = [head for head in range(4) if head not in chosen[seen.layer]]
        return found.index_copy(1, torch.tensor(others), torch.rand_like(found[:, others]))

    monkeypatch.setattr(Observation, "weights", noisy)
    assert held(fed(net, method(net))) == before


def test_with_all_heads_and_equal_layers_it_is_snapkv_with_one_list_for_all_heads():
    net = masking.model()
    mine = held(fed(net, method(net, first_k=4, errors=[1.0] * 4)))
    snap = tiny.cache(net, f"snapkv(budget={BUDGET}, window={WINDOW}, kernel=5, per_head=False)")
    tiny.feed(net, snap, tiny.ids(1, PROMPT))
    assert mine == held(snap)
    assert mine != held(fed(net, method(net, first_k=1, errors=[1.0] * 4)))


@pytest.mark.parametrize(
    ("importance", "mean"),
    [
        ((0.4, 0.1, 0.2, 0.3), 64),
        ((0.97, 0.01, 0.01, 0.01), 100),
        ((0.25, 0.25, 0.25, 0.25), 33),
        ((1.0, 0.0, 0.0), 50),
    ],
)
def test_budgets_add_up_lie_within_bounds_and_follow_importance(importance, mean):
    given = list(capacities(importance, mean, 32, 3))
    assert sum(given) == mean * len(importance)
    assert all(32 <= each <= 3 * mean for each in given)
    pairs = [
        (a, b)
        for a, more in zip(given, importance, strict=True)
        for b, less in zip(given, importance, strict=True)
        if more > less
    ]
    assert all(a >= b for a, b in pairs)


def test_budgets_of_the_published_rule():
    # 32 each, and shares of the 128 left: 51.2, 12.8, 25.6, 38.4.
    assert list(capacities((0.4, 0.1, 0.2, 0.3), 64, 32, 3)) == [83, 45, 58, 70]
    # Shares of 32 of 0.63, 0.07, 0.3 are cut to 20 and 2, and rounded to 10: nothing is left over.
    assert list(capacities((0.63, 0.07, 0.30), 43, 32, 3)) == [53, 34, 42]
    # Rounding gave one too many, which the least important gives back.
    assert list(capacities((0.5, 0.3, 0.2), 33, 32, 3)) == [34, 33, 32]
    # What exceeds three means goes to the most important of the others.
    assert list(capacities((0.9, 0.06, 0.04, 0.0, 0.0), 64, 32, 3)) == [176, 42, 38, 32, 32]
    assert list(capacities((0.0, 0.0), 20, 32, 3)) == [20, 20]


def test_a_head_that_looks_at_the_whole_span_scores_high_however_little_it_gives_the_token_copied():
    ids = torch.tensor([[1, 2, 50, 51, 52, 3, 4, 51, 52]])
    needle = Needle(ids, range(2, 5), prompt=7)
    weights = torch.zeros(3, 2, 9)
    # The first head looks at all that says it but the token that is given; the second at that alone; the third
    # somewhere else.
    weights[0, :, 2], weights[0, 0, 4], weights[0, 1, 3] = 0.5, 0.4, 0.4
    weights[1, 0, 3] = weights[1, 1, 4] = 0.3
    weights[2, :, 0] = 1.0
    torch.testing.assert_close(span_scores(weights, needle), torch.tensor([1.8, 0.6, 0.0]))
    # By the rule of the best token alone it would count for nothing.
    copied = torch.stack([weights[:, i, 3 + i] * (weights[:, i].argmax(-1) == 3 + i) for i in range(2)]).sum(0)
    assert copied.tolist() == pytest.approx([0, 0.6, 0])
    # A token that is in the span twice counts twice, and one that is not counts for nothing.
    twice = replace(needle, ids=torch.tensor([[1, 2, 51, 51, 52, 3, 4, 51, 9]]))
    torch.testing.assert_close(span_scores(weights, twice), torch.tensor([1.8, 0.6, 0.0]))


@pytest.fixture(scope="module")
def embedded() -> Any:
    from transformers import AutoModelForCausalLM

    from kvote.models import embedded

    return AutoModelForCausalLM.from_pretrained(embedded(), dtype=torch.float32).eval()


def test_calibration_finds_the_layer_that_retrieves(embedded):
    told: list[int] = []
    made = measure_semantic(embedded, world_needles(300, seed=5), samples=3, progress=told.append)
    spans, errors = facts_of(made)
    assert told == [1, 1, 1]
    assert sum(errors.values()) == pytest.approx(1, abs=1e-5)
    best = max(spans, key=lambda layer: max(spans[layer]))
    assert max(spans[best]) > 10 * max(max(heads) for layer, heads in spans.items() if layer != best)
    # A method is built of it for this model alone.
    cache = Cache(embedded, compresskv(made, budget=64))
    assert cache.method.calibrations == (made,)
    with pytest.raises(InputError, match="another model"):
        Cache(tiny.model(), compresskv(made, budget=64))


def test_texts_of_ones_own_say_three_facts_and_ask_for_one():
    class Words:
        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = False) -> Any:
            return SimpleNamespace(input_ids=[100 + ord(each) for each in text])

    made = text_needles(Words(), "It rained again. " * 30, longest=400)
    for needle in (next(made), next(made)):
        text = "".join(chr(int(each) - 100) for each in needle.ids[0, 1:])
        answer, fact = text[needle.prompt - 1 :], text[needle.span.start - 1 : needle.span.stop - 1]
        assert needle.ids.shape[1] <= 400
        assert text.count("\nThe code for ") == 4
        assert fact.startswith("\nThe code for ")
        assert fact.rstrip() == text[: needle.prompt - 1].rsplit("\n", 1)[1].join(["\n", answer])
    with pytest.raises(InputError, match="allow longer texts"):
        next(text_needles(Words(), "It rained again. " * 30, longest=120))


def test_a_model_that_answers_nothing_is_refused():
    net = tiny.model(vocab_size=3456)
    with pytest.raises(InputError, match="answers none of 2 questions"):
        measure_semantic(net, world_needles(256), samples=2)


def test_best_heads_are_those_of_the_layer():
    assert best_heads((0.1, 0.9, 0.3, 0.9), 2) == (1, 3)
    assert best_heads((0.5, 0.5, 0.5), 2) == (0, 1)
    assert best_heads((0.5, 0.1), 9) == (0, 1)


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ({}, "holds no layers"),
        ({"9": {"span": [0.1] * 4, "error": 0.1}}, "is not one of the model's"),
        ({"0": {"span": [0.1] * 4}}, "is not one of the model's"),
        ({"0": {"span": [0.1] * 3, "error": 0.1}}, "is not 4 numbers of at least 0"),
        ({"0": {"span": [0.1, 0.1, 0.1, -1], "error": 0.1}}, "is not 4 numbers of at least 0"),
        ({"0": {"span": [0.1] * 4, "error": "much"}}, "error of layer 0 is not a number"),
    ],
)
def test_a_calibration_that_makes_no_sense_is_refused(layers, sentence):
    made = scored.semantic(masking.model(), SPANS, ERRORS)
    with pytest.raises(InputError, match=sentence):
        compresskv(replace(made, data={"layers": layers}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"first_k": 0}, "first_k must be a whole number of at least 1; got 0"),
        ({"budget": 6}, "budget must exceed the window of 6"),
        ({"kernel": 4}, "kernel must be odd"),
        ({"least": 0}, "least must be"),
        ({"most": 0}, "most must be"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(changes, sentence):
    with pytest.raises(MethodError, match=sentence):
        method(masking.model(), **changes)


def test_it_must_be_told_the_heads():
    with pytest.raises(MethodError, match="kvote calibrate --model MODEL --what semantic"):
        compresskv()
    with pytest.raises(MethodError, match="heads must be the name of a file; got 3"):
        compresskv(3)
