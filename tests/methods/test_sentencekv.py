"""SentenceKV: the proofs of its card (arXiv 2504.00970)."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from kvote import Cache, MethodError
from kvote.methods import sentencekv
from kvote.read.best_sentences import BestSentences
from kvote.sentences import sentence_ends
from kvote.spec import parse

STOP, TOKENS, FIRST, LAST, KEPT = 7, 20, 3, 4, 40
SPEC = f"sentencekv(ends=({STOP}, 9), tokens={TOKENS}, factor=2.0, window=6, first={FIRST}, last={LAST})"
# Sentences of 5, 8, 3, 20, ... tokens.
LENGTHS = (5, 8, 3, 20, 7, 11, 6)


def text(seed: int = 0, end: bool = True) -> Tensor:
    """Ids [1, n], the ends of sentences among them."""
    ids = tiny.ids(1, sum(LENGTHS), seed)
    ids[(ids == STOP) | (ids == 9)] = 11
    ids[0, torch.tensor(LENGTHS).cumsum(0) - 1] = STOP
    return ids if end else ids[:, :-1]


class Seen:
    """What layer 1 reads in each generated token: how many tokens, or the list of each query head."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.lists: list[Any] = []
        self.queries: list[Tensor] = []
        read = BestSentences.read

        def reading(reader: BestSentences, at: Any) -> Any:
            for span in read(reader, at):
                if at.decode and at.layer == 1:
                    index = span.reads[0].index
                    self.lists.append(index if isinstance(index, range) else index[0, :, 0])
                    self.queries.append(at.queries.rotated[0, :, 0])
                yield span

        patch.setattr(BestSentences, "read", reading)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


def fed(spec: str = SPEC, generated: tuple[int, ...] = (), prompt: Tensor | None = None) -> Cache:
    net = tiny.model()
    cache = tiny.cache(net, spec)
    tiny.feed(net, cache, text() if prompt is None else prompt)
    if generated:
        tiny.feed(net, cache, torch.tensor([generated]), passes=1)
    return cache


def test_dense_steps_are_those_that_end_a_sentence_and_the_first_of_the_next(seen):
    fed(generated=(50, 51, 52, STOP, 53, 54, 9, 55, STOP, 56, 57))
    dense = [isinstance(index, range) for index in seen.lists]
    assert dense == [True, False, False, True, True, False, True, True, True, True, False]
    assert all(each.shape == (4, TOKENS) for each in seen.lists if isinstance(each, Tensor))


def published(cache: Cache, queries: Tensor, generated: int) -> list[list[int]]:
    """The slots that each query head reads once ``queries`` [m, heads, d] of a sentence came, by the published rule."""
    segment = cache.managed[1].segment
    key, chosen = segment.decode([0], 0, KEPT)[0][0], []
    ends = (torch.tensor(LENGTHS).cumsum(0) - 1).tolist()
    for head in range(4):
        places = segment.positions(0)[head // 2].tolist()
        held: dict[int, list[int]] = {}
        for slot, place in enumerate(places[:KEPT]):
            held.setdefault(sum(end < place for end in ends), []).append(slot)
        scores = {each: float(key[head // 2, slots].mean(0) @ queries[:, head].mean(0)) for each, slots in held.items()}
        best = [slot for each in sorted(held, key=lambda each: -scores[each]) for slot in held[each]]
        n = KEPT + generated
        best = [slot for slot in best if FIRST <= slot < n - LAST][: TOKENS - FIRST - LAST]
        chosen.append(sorted([*range(FIRST), *best, *range(n - LAST, n)]))
    return chosen


def test_heads_read_the_first_the_last_and_the_sentences_most_like_their_own(seen):
    cache = fed(generated=(50, 51, 52))
    assert seen.lists[-1].tolist() == published(cache, torch.stack(seen.queries), 3)
    # The mean of the running sentence asks, not its latest query.
    assert seen.lists[-1].tolist() != published(cache, torch.stack(seen.queries[-1:]), 3)


def test_a_prompt_keeps_what_snapkv_keeps():
    cache = fed()
    like = fed(f"snapkv(budget={KEPT}, window=6, kernel=7, pooling='max')")
    for layer in range(2):
        for mine, other in zip(cache.positions(layer), like.positions(layer), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    assert [layer.tokens_held for layer in cache.report().layers] == [KEPT, KEPT]


@pytest.mark.parametrize("prompt", [text(), text(end=False)])
def test_reading_as_much_as_there_is_is_dense_attention(prompt):
    net, more = tiny.model(), torch.tensor([[50, 51, 52, STOP, 53, 54, 55]])
    for spec, same in (("sentencekv(ends=(7,), tokens=500)", True), (SPEC, False)):
        cache, dense = tiny.cache(net, spec), tiny.cache(net, "dense")
        for each in (cache, dense):
            tiny.feed(net, each, prompt)
        got, expected = (tiny.feed(net, each, more, passes=1) for each in (cache, dense))
        assert torch.allclose(got, expected, atol=1e-4) == same


def test_ending_a_sentence_adds_the_mean_of_its_keys():
    cache = fed(generated=(50, 51, 52))
    layer = cache.managed[1]
    before = layer.memory.grouped[0].keys
    tiny.feed(tiny.model(), cache, torch.tensor([[STOP, 53, 54]]), passes=1)
    after = layer.memory.grouped[0].keys
    assert after.shape[1] == before.shape[1] + 1
    torch.testing.assert_close(after[:, :-1], before)
    own = layer.segment.decode([0], KEPT, KEPT + 4)[0][0]
    torch.testing.assert_close(after[:, -1], own.mean(1))


def test_a_sentence_like_the_question_is_read_whole():
    cache = fed(generated=(50, 51))
    layer = cache.managed[1]
    reader, memory = layer.method.read, layer.memory
    known, now = memory.grouped[0], memory.rows[0]
    number = int(known.of[0, 15])
    planted = copy.copy(now)
    object.__setattr__(planted, "queries", known.keys[:, number].repeat_interleave(2, 0)[None].repeat(2, 1, 1) * 1e3)
    reading = SimpleNamespace(rows=[0], first=KEPT + 2, segment=layer.segment)
    for head, read in enumerate(reader._chosen(reading, memory, planted)):
        slots = (known.of[head // 2] == number).nonzero()[:, 0]
        slots = slots[(slots >= FIRST) & (slots < KEPT + 3 - LAST)][: TOKENS - FIRST - LAST]
        assert set(slots.tolist()) <= set(read.tolist())


def test_sentences_without_an_end_are_cut():
    cache = fed(SPEC.replace("last=4", "last=4, longest=10").replace("ends=(7, 9)", "ends=(1,)"), (50, 51))
    assert cache.managed[1].memory.grouped[0].keys.shape[1] == sum(LENGTHS) // 10


def test_a_rollback_within_a_sentence_leaves_no_trace():
    net = tiny.model()
    cache, fresh = fed(generated=(50, 51, 52)), fed(generated=(50, 51, 52))
    cache.activate_past_recording()
    tiny.feed(net, cache, torch.tensor([[60, 61, 62]]), passes=1)
    cache.crop(-3)
    more = torch.tensor([[53, 54, STOP, 55, 56]])
    torch.testing.assert_close(*(tiny.feed(net, each, more, passes=1) for each in (cache, fresh)))


def test_rows_of_a_batch_end_their_sentences_apart():
    net = tiny.model()
    prompts, more = torch.cat([text(0), text(1)]), torch.tensor([[50, STOP, 51, 52, 53], [54, 55, 56, STOP, 57]])
    cache = tiny.cache(net, SPEC)
    tiny.feed(net, cache, prompts)
    got = tiny.feed(net, cache, more, passes=1)
    for row in range(2):
        one = fed(prompt=prompts[row : row + 1])
        torch.testing.assert_close(got[row : row + 1], tiny.feed(net, one, more[row : row + 1], passes=1))


def test_it_must_be_told_what_ends_a_sentence():
    with pytest.raises(MethodError, match=r"write sentencekv\(ends=\(13, 30\)\)"):
        Cache(tiny.model(), "sentencekv")


def test_ends_are_found_by_the_text_of_tokens():
    words = ["<s>", "one", ".", "?", ' ."', ".\n", "\n\n", "\n", "。", "...", "a.b"]
    parts = {"__len__": lambda self: len(words), "decode": lambda self, ids, **_: words[ids[0]], "all_special_ids": [0]}
    assert sentence_ends(type("Words", (), parts)()) == (2, 3, 4, 5, 6, 8, 9)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"tokens": 64}, "tokens must exceed the 32 first and 32 last ones, which are always read; got 64"),
        ({"factor": 0.5}, "factor must be a number of at least 1; got 0.5"),
        ({"ends": (1.5,)}, r"ends must be token ids, such as \(13, 30, 0\); got \(1.5,\)"),
        ({"longest": 0}, "longest must be a whole number of at least 1; got 0"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters, message):
    with pytest.raises(MethodError, match=message):
        sentencekv(**parameters)


def test_a_spec_names_the_ends():
    assert parse("sentencekv(ends=(7, 9))").read.ends == (7, 9)
