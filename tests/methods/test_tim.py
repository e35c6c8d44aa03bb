"""TIM: the proofs of its card (arXiv 2507.16784), on scripted task trees."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import DynamicCache

from kvote import Cache, InputError, MethodError
from kvote.keep.subtasks import CLOSES, INSIDE, OPENS, ended, outdated
from kvote.methods import tim
from kvote.spec import parse
from kvote.subtasks import EncodesAgain, encode_again

OPEN, CLOSE, BODY = 7, 9, 12
SPEC = f"tim(opens=({OPEN},), closes=({CLOSE},)"


def words(count: int, seed: int) -> list[int]:
    """Tokens that open and close nothing."""
    return (torch.randint(20, 250, (count,), generator=torch.Generator().manual_seed(seed))).tolist()


def tree(subtasks: int, body: int = BODY) -> list[int]:
    """A thought, and subtasks one after the other, each in a list of its own with a conclusion of three behind it."""
    ids = words(6, 0)
    for i in range(subtasks):
        ids += [OPEN, *words(body, 10 + i), CLOSE, *words(3, 100 + i)]
    return ids


def visible(ids: list[int], threshold: int) -> list[int]:
    """What stays of a flat tree: the bodies of the last ``threshold`` lists, and all else."""
    closed = [i for i, each in enumerate(ids) if each == CLOSE]
    stay, inside, number = [], False, 0
    for each in ids:
        inside = inside and each != CLOSE
        if not inside or number >= len(closed) - threshold:
            stay.append(each)
        if each == OPEN:
            inside = True
        number += each == CLOSE
    return stay


def fresh(net: Any, ids: list[int]) -> tuple[Tensor, list[Tensor]]:
    """The last logits of the text in one pass with transformers' own cache, and its keys and values by layer."""
    cache = DynamicCache(config=net.config)
    with torch.no_grad():
        out = net(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    return out.logits[:, -1], [part for layer in cache.layers for part in (layer.keys[0], layer.values[0])]


def held(cache: Any, net: Any) -> list[Tensor]:
    """The keys, rotated as at the positions 0, 1, 2, ..., and values that a cache holds by layer."""
    found = []
    for layer in cache.managed:
        n = layer.segment.length(0)
        key, value = layer.segment.decode([0], 0, n)
        angles = layer.rope.angles(torch.arange(n)[None], key.dtype)
        found += [layer.rope.apply(key, tuple(each[:, None] for each in angles))[0], value[0]]
    return found


def same(cache: Any, net: Any, logits: Tensor, ids: list[int]) -> None:
    """The cache and the logits are those of a text of ``ids`` that nothing came before."""
    expected, parts = fresh(net, ids)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for mine, other in zip(held(cache, net), parts, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("threshold", [0, 1, 2])
def test_after_every_list_that_goes_the_cache_is_that_of_the_text_without_it(threshold):
    net, ids = tiny.model(num_hidden_layers=3), tree(4)
    cache, seen, pruned = tiny.cache(net, f"{SPEC}, threshold={threshold})"), [], 0
    for each in ids:
        logits = tiny.feed(net, cache, torch.tensor([[each]]))[:, -1]
        seen.append(each)
        again = encode_again(net, cache)
        if again is not None:
            pruned += 1
            same(cache, net, again, visible(seen, threshold))
            assert encode_again(net, cache) is None
        else:
            torch.testing.assert_close(logits, fresh(net, visible(seen, threshold))[0], atol=1e-4, rtol=1e-4)
    assert pruned == 4 - threshold
    assert cache.get_seq_length() == len(ids)
    assert cache.managed[0].segment.length(0) == len(ids) - pruned * BODY


def test_without_encoding_again_positions_are_right_and_what_follows_still_knows():
    net, ids = tiny.model(num_hidden_layers=3), tree(3)
    cache = tiny.cache(net, f"{SPEC}, threshold=0)")
    tiny.feed(net, cache, torch.tensor([ids]))
    cut = visible(ids, 0)
    assert cache.managed[0].segment.length(0) == len(cut)
    mine, parts = held(cache, net), fresh(net, cut)[1]
    # The first layer's keys know of nothing but their own tokens and positions.
    torch.testing.assert_close(mine[0], parts[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(mine[4], parts[4], atol=1e-2)
    # A prompt that was pruned at its end is encoded again from the first list on.
    same(cache, net, encode_again(net, cache), cut)


@pytest.mark.parametrize("subtasks", [3, 12])
def test_what_is_held_does_not_grow_with_the_number_of_subtasks_but_for_their_conclusions(subtasks):
    net, ids = tiny.model(), tree(subtasks)
    cache, most = tiny.cache(net, f"{SPEC}, threshold=1)"), 0
    for i, each in enumerate(ids):
        tiny.feed(net, cache, torch.tensor([[each]]))
        done = sum(each == CLOSE for each in ids[: i + 1])
        # A thought, of each list what opens, closes and concludes it, one list that has ended and one that has not.
        most = max(most, cache.managed[0].segment.length(0) - 5 * done)
    assert most <= 6 + 2 * BODY + 5


def test_a_threshold_never_reached_is_the_model_without_pruning():
    net, prompt = tiny.model(), torch.tensor([tree(3)])
    plain = tiny.generate(net, prompt, tiny.cache(net, "dense"), max_new_tokens=12)
    got = tiny.generate(net, prompt, tiny.cache(net, f"{SPEC}, threshold=99)"), max_new_tokens=12)
    assert torch.equal(plain.sequences, got.sequences)


def test_a_result_of_a_tool_is_appended_in_one_pass():
    net, ids, result = tiny.model(), [*tree(2), OPEN, *words(4, 3)], words(9, 4)
    whole, single, calls = *(tiny.cache(net, f"{SPEC}, threshold=1)") for _ in range(2)), []
    for cache in (whole, single):
        tiny.feed(net, cache, torch.tensor([ids]))
        encode_again(net, cache)
    hook = net.register_forward_hook(lambda *_: calls.append(1))
    logits = tiny.feed(net, whole, torch.tensor([result]))[:, -1]
    hook.remove()
    assert len(calls) == 1
    one_by_one = tiny.feed(net, single, torch.tensor([result]), passes=1)[:, -1]
    torch.testing.assert_close(logits, one_by_one, atol=1e-4, rtol=1e-4)


def test_generate_goes_on_from_the_text_without_what_went():
    """Greedily, by the last token of the visible text alone, whenever a list has gone."""
    net, ids = tiny.model(num_hidden_layers=3), tree(3)
    cache = tiny.cache(net, f"{SPEC}, threshold=0)")
    out = net.generate(
        torch.tensor([ids]),
        past_key_values=cache,
        max_new_tokens=5,
        do_sample=False,
        logits_processor=[EncodesAgain(net, cache)],
    )
    seen = visible(ids, 0)
    for each in out[0, len(ids) :].tolist():
        assert each == int(fresh(net, seen)[0].argmax())
        seen.append(each)


def test_marks_name_lists_as_tokens_do():
    net, ids = tiny.model(num_hidden_layers=3), tree(3)
    cache = tiny.cache(net, "tim(threshold=1, mark='task')")
    starts = [i + 1 for i, each in enumerate(ids) if each == OPEN]
    for start in starts:
        cache.mark_span("task", start, start + BODY)
    tiny.feed(net, cache, torch.tensor([ids]))
    same(cache, net, encode_again(net, cache), visible(ids, 1))
    # What is still there is marked as before: the next list to end makes it go.
    more = [OPEN, *words(5, 1), CLOSE, *words(2, 2)]
    cache.mark_span("task", len(ids) + 1, len(ids) + 6)
    tiny.feed(net, cache, torch.tensor([more]), passes=1)
    same(cache, net, encode_again(net, cache), [*visible(ids, 0), *more])


def test_lists_within_lists_go_with_the_one_around_them():
    o, c = OPENS, CLOSES
    parts = [0, o, 0, o, 0, 0, c, 0, o, 0, c, c, 0, o, 0, c, c]
    assert ended(parts) == [(4, 6), (9, 10), (2, 11), (14, 15)]
    assert outdated(parts, 4) == []
    assert outdated(parts, 3) == [(4, 6)]
    assert outdated(parts, 2) == [(4, 6), (9, 10)]
    assert outdated(parts, 1) == [(4, 6), (9, 10), (2, 11)]
    # Empty lists, and one that has not ended, count for nothing; nor does what closes none.
    assert outdated([c, o, c, o, 0, c, o, 0], 1) == []
    assert ended([0, INSIDE, INSIDE, 0, INSIDE]) == [(1, 3)]


def test_rows_are_pruned_each_by_itself():
    net = tiny.model()
    flat = [each if each not in (OPEN, CLOSE) else 11 for each in tree(3)]
    cache = tiny.cache(net, f"{SPEC}, threshold=0)")
    tiny.feed(net, cache, torch.tensor([tree(3), flat]))
    tiny.feed(net, cache, torch.tensor([[3], [4]]))
    assert [cache.managed[0].segment.length(row) for row in (0, 1)] == [len(visible(tree(3), 0)) + 1, len(flat) + 1]
    assert cache.managed[0].record.memory.ids[0].tolist() == [*visible(tree(3), 0), 3]


REFUSED = {
    "dense": (lambda net: tiny.cache(net, "dense"), "Only a method that drops finished subtasks"),
    "rows": (lambda net: tiny.cache(net, f"{SPEC})"), "for one sequence without padding"),
}


@pytest.mark.parametrize(("made", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_encoded_again_is_refused(made, sentence):
    net = tiny.model()
    cache = made(net)
    tiny.feed(net, cache, tiny.ids(2, 20))
    with pytest.raises(InputError, match=sentence):
        encode_again(net, cache)


def test_sliding_layers_are_refused():
    net = tiny.model("gemma3")
    cache = Cache(net, f"{SPEC})")
    tiny.feed(net, cache, tiny.ids(1, 20))
    with pytest.raises(InputError, match="layers that kvote does not manage"):
        encode_again(net, cache)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("tim(opens=(7,))", "opens and closes name the tokens"),
        ("tim(opens=(7,), closes=(7,))", "opens and closes name the tokens"),
        ("tim(opens=7, closes=9)", "opens must be token ids, such as .91,.; got 7"),
        ("tim(threshold=-1)", "threshold must be a whole number of at least 0; got -1"),
        ("tim(mark='')", "mark must be the name of spans"),
        ("tim | h2o", "both decide what to keep"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, sentence):
    with pytest.raises(MethodError, match=sentence):
        parse(spec)


def test_a_text_without_marks_is_refused_where_marks_name_the_lists():
    net = tiny.model()
    assert tim().keep.needs.extra_inputs == {"token ids", "marks"}
    with pytest.raises(InputError, match="none is marked"):
        tiny.feed(net, tiny.cache(net, "tim"), tiny.ids(1, 20))
