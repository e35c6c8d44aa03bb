"""TokenSelect: the five proofs of its card (arXiv 2411.02886), and everything it adds."""

from dataclasses import replace

import pytest
import tiny
import torch
from selecting import DIM, Fed, spec, winners

from kvote import kernels
from kvote.read.head_votes import HeadVotes
from kvote.read.votes import head_vote, logit_sum, soft_vote
from kvote.spec import parse

# The five proofs.


def test_proof_1_a_text_that_fits_is_read_whole():
    tokens = tiny.ids(2, 60)
    net = tiny.model()
    expected = tiny.feed(net, None, tokens)
    for positions in ("contiguous", "original"):
        method = spec(top_k=54, positions=positions, theta=0.9)
        got = tiny.feed(net, tiny.cache(net, method), tokens, passes=20)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_proof_1_selecting_every_candidate_equals_dense_without_the_fallback(monkeypatch, trace):
    fed = Fed(spec(top_k=44))
    fed.feed(50)
    monkeypatch.setattr(HeadVotes, "_dense", lambda self, reading, row, stop: self._one_by_one(reading, row, stop))
    out = fed.feed(1)
    assert trace.selected[-1].flatten().tolist() == list(range(51))
    torch.testing.assert_close(out, fed.dense(1), atol=1e-5, rtol=1e-5)


def test_proof_2_scores_depend_on_raw_keys_only(trace):
    one, two = Fed(spec()), Fed(spec())
    two.query, two.key, two.value = one.query, one.key, one.value
    two.places = torch.cat([torch.randperm(40) * 7, torch.arange(1000, 1024)])
    for fed in (one, two):
        fed.feed(40)
        fed.feed(8)
    half = len(trace.votes) // 2
    for a, b in zip(trace.votes[:half], trace.votes[half:], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(trace.selected[:half], trace.selected[half:], strict=True))


@pytest.mark.parametrize("n", [64, 200, 700])
def test_proof_2_no_position_exceeds_the_list(trace, n):
    fed = Fed(spec(tail=5), n=n)
    fed.feed(n - 10, tail_queries=5)
    for _ in range(10):
        fed.feed(1)
    longest = 2 + 6 + 4 + 8
    assert max(trace.tables) == longest
    assert max(index.shape[-1] for index in trace.selected) == longest


def test_proof_3_a_loud_head_outshouts_a_sum_of_logits_but_not_the_votes(trace):
    for selection, finds in (("soft_vote", True), ("head_vote", True), ("logit_sum", False)):
        fed = Fed(spec(selection=selection, top_k=6, chunk=1), heads=4, kv_heads=4)
        needle, distractors = 20, [10, 12, 14, 16, 18, 22, 24, 26]
        fed.query, fed.key = torch.zeros_like(fed.query), 0.01 * torch.randn_like(fed.key)
        fed.query[..., 0] = 1.0
        # Turned back by the window, so that the scoring query is (1, 0, 0, ...).
        cos, sin = fed.rope.angles(torch.tensor([[4]]), torch.float32)
        fed.query = fed.rope.apply(fed.query, (cos, -sin))
        for head in range(3):
            fed.key[0, head, needle, 0] = 30.0
        fed.key[0, 3, distractors, 0] = 1000.0 + torch.arange(8.0)
        fed.feed(60)
        trace.clear()
        fed.feed(1)
        assert (needle in trace.selected[0].flatten().tolist()) is finds, selection


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 1), (14, 2), (8, 8)])
def test_proof_4_votes_sum_to_the_number_of_heads(trace, heads, kv_heads):
    fed = Fed(spec(), heads, kv_heads)
    fed.feed(56)
    fed.feed(1)
    assert len(trace.votes) == 6
    for votes in trace.votes:
        torch.testing.assert_close(votes.sum(-1), torch.full(votes.shape[:-1], float(heads)), atol=1e-3, rtol=1e-3)


def test_proof_5_the_same_query_never_reselects_and_reads_what_it_should(trace):
    fed = Fed(spec(theta=0.999, reuse_span=16))
    fed.feed(52)
    fed.query[:, :, 52:] = fed.query[:, :, 52:53]
    trace.clear()
    for _ in range(12):
        fed.feed(1)
    # From slot 52 to 63 the local context begins at 48, in steps of 16: one selection serves all.
    assert fed.layer.activity.reused == 11
    first = trace.selected[0].flatten().tolist()
    for step, index in enumerate(trace.selected):
        assert index.flatten().tolist() == [*first, *range(53, 53 + step)]


# What a selection is made of.


@pytest.mark.parametrize("head_map", ["gqa", "paper"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (8, 2), (14, 2), (3, 3), (8, 1)])
def test_votes_equal_the_formula(trace, head_map, heads, kv_heads):
    fed = Fed(spec(head_map=head_map), heads, kv_heads)
    fed.feed(56)
    fed.feed(1)
    cuts = [(16 + 8 * i, 24 + 8 * i) for i in range(5)] + [(56, 57)]
    for (a, b), votes, index in zip(cuts, trace.votes, trace.selected, strict=True):
        expected = fed.votes(a, b, a - 4, head_map)
        torch.testing.assert_close(votes.flatten(), expected, atol=1e-4, rtol=1e-3)
        assert index.flatten().tolist() == [0, 1, *winners(votes.flatten()), *range(a - 4, b)]


def test_swapping_two_heads_breaks_the_pairing(trace):
    swapped = [0, 2, 1, 3]
    votes = []
    for order in (range(4), swapped):
        fed = Fed(spec())
        torch.manual_seed(5)
        fed.query, fed.key = torch.randn(1, 4, 64, DIM)[:, list(order)], torch.randn(1, 2, 64, DIM)
        trace.clear()
        fed.feed(56)
        votes.append(trace.votes[-1])
    assert not torch.allclose(*votes, atol=0.1)
    within = Fed(spec())
    torch.manual_seed(5)
    within.query, within.key = torch.randn(1, 4, 64, DIM)[:, [1, 0, 3, 2]], torch.randn(1, 2, 64, DIM)
    within.feed(56)
    torch.testing.assert_close(trace.votes[-1], votes[0], atol=1e-4, rtol=1e-3)


def test_the_paper_pairing_is_the_right_one_only_without_groups(trace):
    for kv_heads, alike in ((4, True), (2, False), (1, True)):
        votes = []
        for head_map in ("gqa", "paper"):
            torch.manual_seed(1)
            fed = Fed(spec(head_map=head_map), 4, kv_heads)
            trace.clear()
            fed.feed(56)
            votes.append(trace.votes[-1])
        assert torch.allclose(*votes, atol=1e-4) is alike


def test_the_window_reaches_back_from_the_start_of_a_chunk(trace):
    fed = Fed(spec())
    fed.feed(64)
    assert len(trace.selected) == 6
    for i, index in enumerate(trace.selected):
        start = 16 + 8 * i
        assert index[0, 0, 8:].tolist() == list(range(start - 4, start + 8))
        assert max(index[0, 0, :8].tolist()) < start - 4


def test_the_tail_selects_token_by_token(trace):
    fed = Fed(spec(tail=5))
    fed.feed(60, tail_queries=5)
    own = trace.selected[-1]
    assert own.shape[:2] == (1, 5)
    for i in range(5):
        slot = 55 + i
        votes = trace.votes[-1][0, i, : slot - 4 - 2]
        torch.testing.assert_close(votes, fed.votes(slot, slot + 1, slot - 4), atol=1e-4, rtol=1e-3)
        assert own[0, i].tolist() == [0, 1, *winners(votes), *range(slot - 4, slot + 1)]
    assert len({tuple(row[:8].tolist()) for row in own[0]}) > 1
    assert trace.selected[-2][0, 0, -1] == 54


def test_the_tail_of_every_turn_counts_but_not_that_of_a_pass():
    net = tiny.model()
    cache = tiny.cache(net, spec(tail=5))
    selections = lambda: cache.report().layers[0].selections  # noqa: E731
    cache.expect(64)
    tiny.feed(net, cache, tiny.ids(1, 64), passes=32)
    # Chunks at 16, 24 .. 48, 56 .. 58 and five tokens.
    assert selections() == 6 + 5
    tiny.feed(net, cache, tiny.ids(1, 16))
    assert selections() == 11 + 2 + 5


def test_a_reset_takes_an_announcement_back():
    net = tiny.model()
    cache = tiny.cache(net, spec(tail=5))
    cache.expect(1000)
    tiny.feed(net, cache, tiny.ids(1, 30))
    cache.reset()
    tiny.feed(net, cache, tiny.ids(1, 64))
    assert cache.report().layers[0].selections == 6 + 5


def test_passes_that_end_at_multiples_of_the_chunk_select_as_one_pass_does():
    tokens = tiny.ids(1, 64)
    net = tiny.model()
    whole = tiny.feed(net, tiny.cache(net, spec()), tokens)
    for passes in (8, 16, 24):
        got = tiny.feed(net, tiny.cache(net, spec()), tokens, passes=passes)
        torch.testing.assert_close(got, whole, atol=1e-4, rtol=1e-4)


def test_a_pass_that_cuts_a_chunk_selects_with_the_average_of_the_queries_it_has(trace):
    fed = Fed(spec())
    for count in (27, 10, 27):
        fed.feed(count)
    cuts = [(16, 24), (24, 27), (27, 32), (32, 37), (37, 40), (40, 48), (48, 56), (56, 64)]
    assert len(trace.selected) == len(cuts)
    for (a, b), votes, index in zip(cuts, trace.votes, trace.selected, strict=True):
        torch.testing.assert_close(votes.flatten(), fed.votes(a, b, a - 4), atol=1e-4, rtol=1e-3)
        assert index.flatten().tolist() == [0, 1, *winners(votes.flatten()), *range(a - 4, b)]


@pytest.mark.parametrize("backend", sorted({kernels.backend(), "reference"}))
@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (4, 4)])
@pytest.mark.parametrize(("count", "tail_queries"), [(1, 1), (8, 0), (5, 5)], ids=["decode step", "chunk", "tail"])
def test_every_list_is_attended_causally_at_new_positions(trace, monkeypatch, backend, heads, count, tail_queries):
    monkeypatch.setenv("KVOTE_BACKEND", backend)
    fed = Fed(spec(tail=5), *heads)
    fed.feed(48)
    out = fed.feed(count, tail_queries)
    index = trace.selected[-1][0]
    rows = count // len(index)
    for i in range(count):
        mine = index[i // rows]
        seen = mine[: len(mine) - rows + i % rows + 1]
        expected = fed.attended(seen, 48 + i, at=len(mine) - rows + i % rows)
        torch.testing.assert_close(out[:, i], expected, atol=1e-5, rtol=1e-5)


def test_original_positions_keep_those_of_the_text(trace):
    fed = Fed(spec(positions="original"))
    fed.feed(56)
    out = fed.feed(1)
    index = trace.selected[-1].flatten()
    key = fed.rotated(fed.key, 0, 57)[:, :, index].repeat_interleave(2, 1)
    value = fed.value[:, :, index].repeat_interleave(2, 1)
    query = fed.rotated(fed.query, 56, 57)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_max_pool_spreads_votes_to_neighbours(trace, size):
    fed = Fed(spec(max_pool=size))
    fed.feed(56)
    votes = fed.votes(48, 56, 44)
    pooled = kernels.max_pool(votes, size)
    torch.testing.assert_close(trace.votes[-1].flatten(), pooled, atol=1e-4, rtol=1e-3)
    chosen = trace.selected[-1][0, 0, 2:8] - 2
    assert pooled[chosen].min() >= pooled.topk(6).values.min() - 1e-4
    assert int(votes.argmax()) in chosen.tolist()


@pytest.mark.parametrize("max_pool", [0, 5])
@pytest.mark.parametrize("selection", ["soft_vote", "head_vote", "logit_sum"])
def test_a_token_of_the_window_never_wins(trace, max_pool, selection):
    fed = Fed(spec(tail=9, max_pool=max_pool, selection=selection))
    fed.key[:, :, 40:] *= 10
    fed.feed(60, tail_queries=9)
    for i, tokens in enumerate(trace.selected[-1][0].tolist()):
        assert tokens == sorted(set(tokens))
        assert max(tokens[2:8]) < 51 + i - 4


def test_the_ablation_votes_equal_their_formulas(trace):
    logits = torch.randn(2, 3, 4, 30)
    assert torch.equal(logit_sum(logits, 5), logits.sum(2))
    torch.testing.assert_close(soft_vote(logits, 5), logits.softmax(-1).sum(2))
    votes = head_vote(logits, 5)
    for b, r in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        counted = torch.zeros(30)
        for head in range(4):
            counted[logits[b, r, head].topk(5).indices] += 1
        assert torch.equal(votes[b, r], counted)


@pytest.mark.parametrize("selection", ["head_vote", "logit_sum"])
def test_the_ablations_really_select_with_their_votes(trace, selection):
    fed = Fed(spec(selection=selection))
    fed.feed(56)
    total = trace.votes[-1].sum().item()
    assert (total == pytest.approx(4 * 6)) is (selection == "head_vote")


def test_every_row_of_a_ragged_batch_selects_as_it_would_alone(trace):
    tokens, mask = tiny.padded(3, 60, [0, 9, 20])
    net = tiny.model(num_hidden_layers=1)
    tiny.feed(net, tiny.cache(net, spec(chunk=1)), tokens, mask)
    together = sorted(str(index[i].tolist()) for index in trace.selected for i in range(len(index)))
    trace.clear()
    for row, pads in enumerate([0, 9, 20]):
        tiny.feed(net, tiny.cache(net, spec(chunk=1)), tokens[row : row + 1, pads:])
    assert together == sorted(str(index[0].tolist()) for index in trace.selected)


@pytest.mark.skipif(kernels.backend() != "cpu", reason="sketches need the compiled kernels")
def test_an_8_bit_sketch_selects_nearly_the_same(trace):
    shared = []
    for sketch in ("none", "int8"):
        torch.manual_seed(3)
        fed = Fed(spec(sketch=sketch), n=400)
        trace.clear()
        fed.feed(400)
        shared.append([set(index[0, 0, 2:8].tolist()) for index in trace.selected])
    same = [len(a & b) for a, b in zip(*shared, strict=True)]
    assert sum(same) > 0.9 * 6 * len(same)


def test_compiled_and_reference_kernels_select_alike(trace, monkeypatch):
    lists = []
    for backend in (kernels.backend(), "reference"):
        monkeypatch.setenv("KVOTE_BACKEND", backend)
        torch.manual_seed(3)
        fed = Fed(spec(tail=5), n=200)
        trace.clear()
        fed.feed(199, tail_queries=5)
        out = fed.feed(1)
        lists.append(([index.tolist() for index in trace.selected], out))
    assert lists[0][0] == lists[1][0]
    torch.testing.assert_close(lists[0][1], lists[1][1], atol=1e-5, rtol=1e-5)


def test_parameters_are_values_of_the_reader():
    read = parse(spec()).read
    assert isinstance(read, HeadVotes)
    assert replace(read, top_k=9).top_k == 9
