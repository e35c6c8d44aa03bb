"""Pages and raw segments against a model so plain that it must be right: a list of tokens per sequence."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from kvote.index.bounds import Bounds, BoundsIndex
from kvote.index.sketch import SketchIndex
from kvote.kernels import cpu
from kvote.kernels.lanes import Lanes
from kvote.store.pages import PAGE, PagePool
from kvote.store.segment import Scaling
from kvote.store.uncompressed import UncompressedSegment
from kvote.tokens import Queries, TokenSet

HEADS, DIM, VALUE_DIM = 2, 16, 4
ONE_OR_MORE_PAGES = st.sampled_from([1, 2, 7, 60, 63, 64, 65, 130, 200])


def content(tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Keys [heads, t, d] and values [heads, t, dv] that tell token and head."""
    token = torch.tensor(tokens, dtype=torch.float32)[None, :, None]
    head = torch.arange(HEADS, dtype=torch.float32)[:, None, None]
    return (token + 0.25 * head).expand(-1, -1, DIM), (-token - 0.25 * head).expand(-1, -1, VALUE_DIM)


def segment(sequences: int = 0, *, sketch_bits: int = 0) -> UncompressedSegment:
    made = UncompressedSegment(HEADS, torch.empty(0, DIM), VALUE_DIM, None)
    made.add_sequences(sequences)
    if sketch_bits:
        made.add_index(SketchIndex(sketch_bits), 0)
    made.add_index(BoundsIndex(16), 0)
    return made


def append(held: UncompressedSegment, rows: list[int], tokens: list[list[int]]) -> None:
    """Every token is its own position too."""
    key, value = (torch.stack(parts) for parts in zip(*(content(t) for t in tokens), strict=True))
    held.append(rows, key, value, torch.tensor(tokens))


def owners(pool: PagePool) -> np.ndarray:
    """How many lanes really use each page."""
    used = np.zeros(len(pool.owners), np.int64)
    for lane in pool.lanes:
        ids = lane.page_ids()
        assert len(set(ids.tolist())) == len(ids), "a lane uses a page twice"
        used[ids] += 1
    return used


def sketches_are_those_of_the_keys(held: UncompressedSegment) -> None:
    if sketch := held.indexes.get("sketch"):
        assert sketch.coded is not None
        codes, bits = sketch.coded
        again = codes.clone()
        # What was cropped into its first page keeps the centre it had until that page is written again.
        for lane in (lane for lane in held.pool.lanes if lane.length >= PAGE):
            cpu.sketch(held.pool.keys, again, bits, Lanes([lane.runs]), 0, lane.length)
        assert torch.equal(again, codes)


def bounds_are_those_of_the_keys(held: UncompressedSegment, tight: bool) -> None:
    """The bounds that a row asks for hold its keys; ``tight``: they are those of no others."""
    bounds = held.indexes["page bounds"]
    assert isinstance(bounds, Bounds)
    for row in range(held.sequences):
        n = held.length(row)
        key = held.decode([row], 0, n)[0][0, :, :, 0]
        for sign in (1.0, -1.0) if n else ():
            query = torch.zeros(1, HEADS, 1, DIM)
            query[..., 0] = sign
            got = bounds.scores(query, [row], n)[0, :, 0]
            short = torch.nn.functional.pad(sign * key, (0, -n % 16), value=float("-inf"))
            law = short.unflatten(1, (-1, 16)).amax(2)
            assert torch.equal(got, law) if tight else bool((got >= law).all())


def check(held: UncompressedSegment, model: list[list[int]]) -> None:
    assert [held.length(row) for row in range(len(model))] == [len(tokens) for tokens in model]
    for row, tokens in enumerate(model):
        assert all(lane.tolist() == tokens for lane in held.positions(row))
        key, value = held.decode([row], 0, len(tokens))
        expected = content(tokens)
        assert torch.equal(key[0], expected[0])
        assert torch.equal(value[0], expected[1])


class Pages(RuleBasedStateMachine):
    """A random life of a segment."""

    @initialize(count=st.integers(1, 3), sketch_bits=st.sampled_from([0, 4, 8]))
    def start(self, count: int, sketch_bits: int) -> None:
        self.held, self.model, self.next = segment(count, sketch_bits=sketch_bits), [[] for _ in range(count)], 0

    def new(self, count: int) -> list[int]:
        self.next += count
        return list(range(self.next - count, self.next))

    def row(self, data: Any) -> int:
        return data.draw(st.integers(0, len(self.model) - 1))

    @precondition(lambda self: len(self.model) < 5)
    @rule()
    def add(self) -> None:
        self.held.add_sequences(1)
        self.model.append([])

    @rule(data=st.data(), t=ONE_OR_MORE_PAGES)
    def append(self, data: Any, t: int) -> None:
        rows = sorted(data.draw(st.sets(st.integers(0, len(self.model) - 1), min_size=1)))
        new = [self.new(t) for _ in rows]
        append(self.held, rows, new)
        for row, tokens in zip(rows, new, strict=True):
            self.model[row] = self.model[row] + tokens
        if len(rows) == len(self.model):
            bounds_are_those_of_the_keys(self.held, tight=True)

    @rule(data=st.data())
    def truncate(self, data: Any) -> None:
        row = self.row(data)
        length = data.draw(st.integers(0, len(self.model[row])))
        self.held.truncate(row, length)
        self.model[row] = self.model[row][:length]

    @precondition(lambda self: any(self.model))
    @rule(data=st.data())
    def keep(self, data: Any) -> None:
        row = self.row(data)
        tokens = self.model[row]
        first, last = data.draw(st.tuples(st.integers(0, 70), st.integers(0, 70)))
        slots = sorted({*range(min(first, len(tokens))), *range(max(0, len(tokens) - last), len(tokens))})
        self.held.keep(row, torch.tensor(slots, dtype=torch.int64))
        self.model[row] = [tokens[slot] for slot in slots]

    @rule(data=st.data(), count=st.integers(1, 5))
    def select(self, data: Any, count: int) -> None:
        index = data.draw(st.lists(st.integers(0, len(self.model) - 1), min_size=count, max_size=count))
        self.held.select(index)
        self.model = [self.model[i] for i in index]

    @rule(tokens=ONE_OR_MORE_PAGES)
    def reserve(self, tokens: int) -> None:
        self.held.reserve(tokens)

    @rule()
    def trim(self) -> None:
        self.held.pool.trim()
        pool = self.held.pool
        assert (pool.owners == 0).sum() <= (pool.owners > 0).sum() / 8 + 2 * len(pool.lanes)

    @invariant()
    def contents_and_positions_are_right(self) -> None:
        check(self.held, self.model)

    @invariant()
    def owners_are_those_who_use_a_page(self) -> None:
        pool = self.held.pool
        assert np.array_equal(owners(pool), pool.owners)
        assert len(pool.owners) == len(pool.keys) == len(pool.values) == len(pool.positions)

    @invariant()
    def sketches_are_those_of_the_keys(self) -> None:
        sketches_are_those_of_the_keys(self.held)

    @invariant()
    def bounds_are_never_below_the_keys(self) -> None:
        bounds_are_those_of_the_keys(self.held, tight=False)


Pages.TestCase.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPages = Pages.TestCase


def test_memory_falls_when_tokens_are_dropped():
    held = segment(2)
    append(held, [0, 1], [list(range(2000)), list(range(2000, 4000))])
    before = held.nbytes
    for row in range(2):
        held.keep(row, torch.cat([torch.arange(4), torch.arange(1980, 2000)]))
    assert held.nbytes < before / 10


def test_memory_falls_when_a_rollback_is_trimmed():
    held = segment(1)
    append(held, [0], [list(range(5000))])
    before = held.nbytes
    held.truncate(0, 100)
    held.pool.trim()
    assert held.nbytes < before / 10


def test_copies_share_their_pages_until_one_writes():
    held = segment(1)
    append(held, [0], [list(range(1000))])
    before = held.nbytes
    held.select([0] * 8)
    assert held.nbytes < 1.05 * before
    assert held.pool.owners.max() == 8
    append(held, [3], [[7777]])
    check(held, [list(range(1000)) + [7777] * (row == 3) for row in range(8)])
    assert held.pool.owners.max() == 8


def test_copies_of_a_segment_with_reserved_pages_do_not_write_over_each_other():
    held = segment(1)
    held.reserve(500)
    append(held, [0], [list(range(100))])
    held.select([0, 0])
    append(held, [0, 1], [[1000, 1001], [2000, 2001]])
    check(held, [[*range(100), 1000, 1001], [*range(100), 2000, 2001]])


def test_lanes_lie_in_one_run_in_the_usual_state():
    held = segment(3)
    for step in range(40):
        append(held, [0, 1, 2], [[step * 30 + i for i in range(30)]] * 3)
    assert all(len(lane.runs) == 1 for lane in held.pool.lanes)
    key, _ = held.decode([0, 1, 2], 5, 700)
    assert key.untyped_storage().data_ptr() == held.pool.keys.untyped_storage().data_ptr()


def test_growth_copies_a_token_a_bounded_number_of_times(monkeypatch):
    held, copied = segment(1), []
    arrange = PagePool.arrange
    monkeypatch.setattr(
        PagePool, "arrange", lambda pool, *a, **k: (copied.append(len(pool.keys)), arrange(pool, *a, **k))
    )
    for step in range(300):
        append(held, [0], [[step] * PAGE])
    assert sum(copied) <= 12 * 300 * HEADS


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("pick", ["range", "list"])
def test_attention_reads_the_tokens_named(scattered, pick):
    held = segment(2)
    append(held, [0, 1], [list(range(100)), list(range(100, 200))])
    if scattered:
        held.select([0, 1, 0, 1])
        append(held, [0, 2], [list(range(200, 300)), list(range(300, 400))])
        held.truncate(0, 100)
        held.truncate(2, 100)
    tokens = [3, 4, 5, 63, 64, 99] if pick == "list" else list(range(60, 70))
    index = torch.tensor(tokens).expand(2, 1, -1) if pick == "list" else range(60, 70)
    query = torch.zeros(2, 2 * HEADS, 1, DIM)
    out, lse = held.attend(Queries(query), [0, 1], TokenSet(index, causal=False), Scaling(1.0))
    for row in range(2):
        _, value = content([100 * row + token for token in tokens])
        expected = value.mean(1).repeat_interleave(2, 0)[:, None]
        torch.testing.assert_close(out[row, :, :, :VALUE_DIM], expected, atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(lse, torch.full_like(lse, float(np.log(len(tokens)))))


def test_blocks_of_queries_read_their_own_lists():
    held = segment(1)
    append(held, [0], [list(range(100))])
    index = torch.tensor([[[1, 2], [50, 99], [70, 71]]])
    out, _ = held.attend(Queries(torch.zeros(1, HEADS, 3, DIM)), [0], TokenSet(index, causal=False), Scaling(1.0))
    assert out[0, 0, :, 0].tolist() == [-1.5, -74.5, -70.5]


def test_scores_are_products_with_the_tokens_between():
    held = segment(2)
    append(held, [0, 1], [list(range(100)), list(range(100, 200))])
    got = held.scores(torch.ones(1, HEADS, 1, DIM), [1], 60, 70)
    key, _ = content(list(range(160, 170)))
    torch.testing.assert_close(got[0, 0], key.sum(-1))


@pytest.mark.parametrize("sketch_bits", [4, 8])
def test_keys_whose_channels_lie_apart_are_sketched_too(sketch_bits):
    held, (key, value) = segment(1, sketch_bits=sketch_bits), content(list(range(100)))
    assert key.stride(-1) != 1
    held.append([0], key[None], value[None], torch.arange(100)[None])
    sketches_are_those_of_the_keys(held)


@pytest.mark.parametrize("sketch_bits", [0, 4, 8])
@pytest.mark.parametrize("seed", range(6))
def test_heads_of_a_sequence_may_keep_different_tokens(seed, sketch_bits):
    generator = torch.Generator().manual_seed(seed)
    held = segment(1, sketch_bits=sketch_bits)
    append(held, [0], [list(range(700))])
    held.select([0, 0])
    lanes = [list(range(700)) for _ in range(HEADS)]
    for count, start in ((400, 1000), (399, 2000), (64, 3000), (1, 4000)):
        picks = [sorted(torch.randperm(len(lane), generator=generator)[:count].tolist()) for lane in lanes]
        held.keep(1, torch.tensor(picks))
        append(held, [1], [list(range(start, start + 30))])
        lanes = [
            [lane[i] for i in pick] + list(range(start, start + 30)) for lane, pick in zip(lanes, picks, strict=True)
        ]
        assert [lane.tolist() for lane in held.positions(1)] == lanes
        key, value = held.decode([1], 0, count + 30)
        for head, lane in enumerate(lanes):
            assert torch.equal(key[0, head], content(lane)[0][head])
            assert torch.equal(value[0, head], content(lane)[1][head])
        assert held.positions(0)[0].tolist() == list(range(700))
        assert np.array_equal(owners(held.pool), held.pool.owners)
        sketches_are_those_of_the_keys(held)
    before = held.nbytes
    held.select([1])
    held.pool.trim()
    assert held.nbytes < before / 2
