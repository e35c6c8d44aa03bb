"""LoopServe: the proofs of its card (arXiv 2507.13681)."""

import math
from functools import partial
from itertools import combinations
from typing import Any

import masking
import pytest
import tiny
import torch
from torch import Tensor

from kvote import CropError, MethodError
from kvote.methods import loopserve
from kvote.read.lines import lines
from kvote.read.sparse_turns import SparseTurns
from kvote.spec import parse

PROMPT, STEPS, TOP, EVERY, WINDOW = 60, 11, 10, 4, 6
SPEC = f"loopserve(alpha=1.0, top_k={TOP}, every={EVERY}, window={WINDOW}, kernel=1)"
SPARSE = "last=6, sample=6, block=1"
run = partial(masking.run, prompt=PROMPT, steps=STEPS)


def causal(g: int, s: int, n: int, seed: int = 0, peaked: float = 3.0) -> tuple[Tensor, Tensor]:
    """Attention [g, s, n] of the last s of n queries, and their slots."""
    logits = peaked * torch.randn(g, s, n, generator=torch.Generator().manual_seed(seed))
    at = torch.arange(n - s, n)
    return logits.masked_fill(torch.arange(n) > at[:, None], float("-inf")).softmax(-1), at


def covered(weights: Tensor, at: Tensor, columns: list[int], slashes: list[int]) -> float:
    """What lies on some of the lines, entry by entry."""
    return sum(
        float(weights[i, j])
        for i, slot in enumerate(at.tolist())
        for j in range(slot + 1)
        if j in columns or slot - j in slashes
    )


def chosen(found: Any, head: int) -> tuple[list[int], list[int]]:
    return found.columns[head].nonzero().flatten().tolist(), found.slashes[head].nonzero().flatten().tolist()


@pytest.mark.parametrize("share", [0.3, 0.8, 0.955])
@pytest.mark.parametrize("seed", range(3))
def test_lines_cover_the_share_asked_for(share, seed):
    weights, at = causal(4, 9, 40, seed)
    found = lines(weights, at, share)
    for head in range(4):
        columns, slashes = chosen(found, head)
        assert 0 in slashes
        assert covered(weights[head], at, columns, slashes) >= share * 9 - 1e-4


def greedy(weights: Tensor, at: Tensor, share: float) -> tuple[list[int], list[int]]:
    """One line at a time, by what is not covered yet, entry by entry."""
    columns, slashes, n = [], [0], weights.shape[1]
    while (have := covered(weights, at, columns, slashes)) < share * len(weights):
        new = [([*columns, j], slashes) for j in range(n) if j not in columns]
        new += [(columns, [*slashes, o]) for o in range(n) if o not in slashes]
        columns, slashes = max(new, key=lambda both: covered(weights, at, *both))
        assert covered(weights, at, columns, slashes) > have
    return columns, slashes


@pytest.mark.parametrize("seed", range(3))
def test_lines_are_taken_greedily_by_what_they_add(seed):
    weights, at = causal(1, 4, 12, seed)
    found = lines(weights, at, 0.7)
    columns, slashes = greedy(weights[0], at, 0.7)
    assert chosen(found, 0) == (sorted(columns), sorted(slashes))


@pytest.mark.parametrize("seed", range(3))
def test_there_are_few_more_lines_than_in_the_best_choice(seed):
    n, share = 7, 0.8
    weights, at = causal(1, 4, n, seed)
    names = [(True, j) for j in range(n)] + [(False, o) for o in range(1, n)]

    def enough(some: tuple[tuple[bool, int], ...]) -> bool:
        columns, slashes = [j for column, j in some if column], [0] + [o for column, o in some if not column]
        return covered(weights[0], at, columns, slashes) >= share * 4

    best = next(k for k in range(len(names)) if any(enough(some) for some in combinations(names, k)))
    columns, slashes = chosen(lines(weights, at, share), 0)
    assert best <= len(columns) + len(slashes) - 1 <= (math.log(n * 4) + 1) * max(1, best)


def test_a_column_that_takes_most_is_nearly_the_only_line():
    logits, at = torch.zeros(1, 8, 40), torch.arange(32, 40)
    before = lines(logits.masked_fill(torch.arange(40) > at[:, None], float("-inf")).softmax(-1), at, 0.9)
    logits[:, :, 5] = 9.0
    after = lines(logits.masked_fill(torch.arange(40) > at[:, None], float("-inf")).softmax(-1), at, 0.9)
    assert chosen(after, 0) == ([5], [0])
    assert int(before.columns.sum() + before.slashes.sum()) > 20


def test_a_block_reads_what_lies_on_a_line_of_any_of_its_queries():
    weights, at = causal(3, 8, 50)
    found = lines(weights, at, 0.6)
    for start, stop in ((10, 14), (47, 50), (1, 2)):
        expected = []
        for head in range(3):
            columns, slashes = chosen(found, head)
            expected.append(
                {j for j in range(start) if j in columns or any(p - j in slashes for p in range(start, stop))}
            )
        read = found.read(start, stop)
        assert read.shape[1] == max(map(len, expected))
        for mine, needed in zip(read.tolist(), expected, strict=True):
            assert mine == sorted(set(mine))
            assert needed <= set(mine)
            rest = [float(found.worth[expected.index(needed), j]) for j in range(start) if j not in set(mine)]
            more = [float(found.worth[expected.index(needed), j]) for j in set(mine) - needed]
            assert not rest or not more or min(more) >= max(rest)


def reference(net: Any, tokens: Tensor, alpha: float, history: int = 0) -> Tensor:
    """Logits of a prompt whose layers read the lines of the sampled queries, by masks; the first ``history`` tokens are
    a turn before, read whole."""
    from transformers import AttentionInterface

    reader = parse(f"loopserve(alpha={alpha}, {SPARSE})").read
    n = tokens.shape[1]
    at = reader.sampled(history, n - history) + history

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, causal_mask: Any, **kwargs: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        late = torch.arange(n) > torch.arange(n)[:, None]
        logits = (query @ key.transpose(-1, -2) * kwargs["scaling"]).masked_fill(late, float("-inf"))
        found = [lines(each.softmax(-1)[:, at], at, alpha) for each in logits]
        for row in range(max(1, history), n):
            most = 0
            masks = []
            for each in found:
                masks.append(each.seen(row, row + 1))
                most = max(most, int(masks[-1].sum(1).max()))
            for b, each in enumerate(found):
                for head in range(query.shape[1]):
                    own = masks[b][head]
                    # Of all sequences and heads, as many as the one whose lines have most.
                    worth = each.worth[head, :row].masked_fill(own, float("inf"))
                    unread = torch.ones(row, dtype=torch.bool)
                    unread[worth.topk(most).indices] = False
                    logits[b, head, row, :row] = logits[b, head, row, :row].masked_fill(unread, float("-inf"))
        return (logits.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("lines", attention)
    net.set_attn_implementation("lines")
    with torch.no_grad():
        out = net(input_ids=tokens).logits
    net.set_attn_implementation("sdpa")
    return out[:, history:]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("history", [0, 23])
def test_a_turn_reads_the_lines_of_its_own_queries_counted_from_where_it_begins(groups, history):
    net, tokens = masking.model(groups), tiny.ids(2, 50)
    cache = tiny.cache(net, f"loopserve(alpha=0.8, {SPARSE})")
    if history:
        cache.expect(history)
        tiny.feed(net, cache, tokens[:, :history], passes=1)
    got = tiny.feed(net, cache, tokens[:, history:])
    torch.testing.assert_close(got, reference(net, tokens, 0.8, history), atol=1e-4, rtol=1e-4)
    dense = tiny.cache(net, "dense")
    assert not torch.allclose(tiny.feed(net, dense, tokens)[:, history:], got, atol=1e-2, rtol=1e-2)
    assert [layer.selections for layer in cache.report().layers] == [2] * 4


@pytest.mark.parametrize("spec", ["loopserve(alpha=1.0)", "loopserve(alpha=0.5)", f"loopserve(alpha=1.0, {SPARSE})"])
def test_all_attention_and_a_budget_that_covers_the_prompt_are_dense_attention_bit_by_bit(spec):
    # A prompt within the sample is read whole too.
    net = masking.model()
    assert torch.equal(run(net, spec)[1], run(net, "dense")[1])


class ChosenTokens:
    """By layer, what each generated token of one sequence read of the prompt, and the queries so far."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.read: list[list[Tensor]] = [[], [], [], []]
        self.queries: list[list[Tensor]] = [[], [], [], []]
        read = SparseTurns.read

        def reading(reader: SparseTurns, at: Any) -> Any:
            self.queries[at.layer].append(at.queries.rotated[0])
            for span in read(reader, at):
                if at.decode:
                    self.read[at.layer].append(span.reads[0].index[0, :, 0])
                    assert span.reads[1].index == range(PROMPT, at.first + 1)
                yield span

        patch.setattr(SparseTurns, "read", reading)


@pytest.mark.parametrize("kernel", [1, 5])
def test_answers_choose_at_their_first_token_and_every_fourth_by_their_own_queries(kernel, monkeypatch):
    seen, net = ChosenTokens(monkeypatch), masking.model()
    cache, _ = run(net, SPEC.replace("kernel=1", f"kernel={kernel}"), rows=1)
    for layer, (lists, queries) in enumerate(zip(seen.read, seen.queries, strict=True)):
        asked = torch.cat(queries, dim=1)
        key = cache.managed[layer].segment.decode([0], 0, PROMPT)[0][0].repeat_interleave(2, dim=0)
        for step, index in enumerate(lists):
            start = step // EVERY * EVERY
            own = slice(PROMPT - WINDOW, PROMPT) if start == 0 else slice(PROMPT + start - EVERY, PROMPT + start)
            logits = asked[:, own] @ key.mT / 4
            if start == 0:
                late = torch.arange(PROMPT) > torch.arange(PROMPT - WINDOW, PROMPT)[:, None]
                logits = logits.masked_fill(late, float("-inf"))
            votes = torch.nn.functional.avg_pool1d(logits.softmax(-1).sum(1), kernel, 1, kernel // 2)
            for head in range(len(votes)):
                assert index[head].tolist() == sorted(votes[head].topk(TOP).indices.tolist())
    report = cache.report().layers
    assert [(layer.selections, layer.reused) for layer in report] == [(3, STEPS - 3)] * 4
    assert all(layer.tokens_read == TOP + STEPS for layer in report)
    # Besides tokens, it holds the queries that choose, those since, and what they chose.
    for layer, plain in zip(cache.managed, run(net, "dense", rows=1)[0].managed, strict=True):
        assert layer.nbytes - plain.nbytes == 4 * (EVERY * 16 + 3 * 16) * 4 + 4 * TOP * 8
    # The answer's own queries see other tokens than the prompt's.
    assert any(not torch.equal(lists[0], lists[EVERY]) for lists in seen.read)


def test_the_next_turn_looks_at_the_answer_too_and_chooses_anew():
    net, tokens = masking.model(), tiny.ids(1, 100)
    cache = tiny.cache(net, SPEC)
    tiny.feed(net, cache, tokens[:, :PROMPT])
    tiny.feed(net, cache, tokens[:, PROMPT : PROMPT + 5], passes=1)
    tiny.feed(net, cache, tokens[:, PROMPT + 5 : PROMPT + 25])
    assert all(layer.memory.rows[0].edge == PROMPT + 25 and not layer.memory.chosen for layer in cache.managed)
    assert all(layer.memory.rows[0].asked.shape[1] == WINDOW for layer in cache.managed)
    tiny.feed(net, cache, tokens[:, PROMPT + 25 : PROMPT + 27], passes=1)
    assert [layer.selections for layer in cache.report().layers] == [3] * 4
    assert all(layer.segment.length(0) == PROMPT + 27 for layer in cache.managed)


@pytest.mark.parametrize("back", [1, 2, 5, 8, 9])
def test_an_announced_rollback_brings_back_what_chose(back):
    net, tokens = masking.model(), tiny.ids(1, PROMPT + 20)
    cache, fresh = (tiny.cache(net, SPEC) for _ in range(2))
    tiny.feed(net, cache, tokens[:, :PROMPT])
    cache.activate_past_recording()
    tiny.feed(net, fresh, tokens[:, :PROMPT])
    tiny.feed(net, cache, tokens[:, PROMPT : PROMPT + 9], passes=1)
    if back < 9:
        tiny.feed(net, fresh, tokens[:, PROMPT : PROMPT + 9 - back], passes=1)
    cache.crop(-back)
    more = tiny.ids(1, 6, seed=3)
    torch.testing.assert_close(
        tiny.feed(net, cache, more, passes=1), tiny.feed(net, fresh, more, passes=1), atol=1e-5, rtol=1e-5
    )


def test_a_rollback_that_was_not_announced_is_refused():
    net = masking.model()
    cache, _ = run(net, SPEC)
    with pytest.raises(CropError, match="activate_past_recording"):
        cache.crop(-1)


def test_methods_that_drop_tokens_are_refused():
    with pytest.raises(MethodError, match="adds up"):
        parse("snapkv | loopserve")


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"alpha": 0.0}, "alpha must be a share of attention, above 0 and at most 1; got 0.0"),
        ({"alpha": 1.5}, "alpha must be a share"),
        ({"kernel": 4}, "kernel must be odd, so that a pooled vote stays at its token; got 4"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1; got 0"),
        ({"every": 0}, "every must be a whole number of at least 1; got 0"),
        ({"window": 0}, "window must be"),
        ({"last": 0}, "last must be"),
        ({"sample": -1}, "sample must be"),
        ({"block": 0}, "block must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters, sentence):
    with pytest.raises(MethodError, match=sentence):
        loopserve(**parameters)
