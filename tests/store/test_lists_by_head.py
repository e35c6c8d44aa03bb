"""Query heads that read different tokens, and channels of the keys that lie apart: answered from the pages."""

import copy

import pytest
import torch
from torch import Tensor

from kvote.index.labels import LabelIndex
from kvote.keep.observation import Observation
from kvote.kernels import reference
from kvote.store.segment import Indexed, Scaling
from kvote.store.uncompressed import UncompressedSegment
from kvote.tokens import Queries, Span, TokenSet

D, SCALING = 32, Scaling(0.3)


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KVOTE_BACKEND", request.param)
    return str(request.param)


def filled(
    rows: int, heads: int, n: int, dtype: torch.dtype, scattered: bool
) -> tuple[UncompressedSegment, Tensor, Tensor]:
    """A segment and its keys and values [rows, heads, n, d]; ``scattered``: lanes in several runs of pages."""
    key, value = (torch.randn(rows, heads, n, D).to(dtype) for _ in range(2))
    segment = UncompressedSegment(heads, key, D, None)
    segment.add_sequences(rows)
    places = torch.arange(n).expand(rows, -1)
    pieces = [(0, n)] if not scattered else [(a, min(n, a + 70)) for a in range(0, n, 70)]
    for a, z in pieces:
        segment.append(list(range(rows)), key[:, :, a:z], value[:, :, a:z], places[:, a:z])
    if scattered:
        # Beams that share pages until they write do not lie in one run.
        segment.select([0] * rows)
        for row in range(rows):
            segment.truncate(row, n - 50)
        key, value = key[:1].repeat(rows, 1, 1, 1), value[:1].repeat(rows, 1, 1, 1)
        key[1:, :, n - 50 :] *= -1
        segment.append(list(range(rows)), key[:, :, n - 50 :], value[:, :, n - 50 :], places[:, n - 50 :])
    return segment, key, value


def lists(rows: int, heads: int, blocks: int, n: int, m: int) -> Tensor:
    return torch.stack([torch.randperm(n)[:m].sort().values for _ in range(rows * heads * blocks)]).reshape(
        rows, heads, blocks, m
    )


def masked(query: Tensor, key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dense attention in which query head i of row t sees index[:, i, t] alone: out, lse and weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    logits = query.double() @ key.transpose(-1, -2) * SCALING.scale
    seen = torch.zeros(logits.shape, dtype=torch.bool).scatter(3, index, True)
    logits = logits.masked_fill(~seen, float("-inf"))
    weights = logits.softmax(-1)
    return weights @ value, logits.logsumexp(-1), weights


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_head_reads_its_own_tokens(groups, rows, blocks, scattered, dtype):
    segment, key, value = filled(rows, 2, 201, dtype, scattered and rows > 1)
    query = torch.randn(rows, 2 * groups, blocks, D).to(dtype)
    index = lists(rows, 2 * groups, blocks, 201, 17)
    # A head that would see its neighbour's tokens answers something else.
    assert not torch.equal(index[:, 0], index[:, 1])
    out, lse = segment.attend(Queries(query), list(range(rows)), TokenSet(index, causal=False), SCALING)
    expected, total, _ = masked(query, key, value, index)
    loose = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(out.double(), expected, atol=loose, rtol=loose)
    torch.testing.assert_close(lse.double(), total, atol=1e-4, rtol=1e-4)


def test_attention_received_follows_the_lists_of_each_head():
    segment, key, value = filled(2, 2, 90, torch.float32, False)
    query, index = torch.randn(2, 6, 1, D), lists(2, 6, 1, 90, 11)
    tokens = TokenSet(index, causal=False)
    _, lse = segment.attend(Queries(query), [0, 1], tokens, SCALING)
    _, _, weights = masked(query, key, value, index)
    seen = Observation(Queries(query), lse, segment, [0, 1], 89, [Span(0, 1, [tokens])], SCALING, None)
    expected = weights.reshape(2, 2, 3, 90).sum(2).float()
    torch.testing.assert_close(seen.mass(), expected, atol=1e-5, rtol=1e-5)
    one = seen.of(1, 90)
    assert one is not None
    torch.testing.assert_close(one.mass(), expected[1:], atol=1e-5, rtol=1e-5)


def channels(heads: int, r: int) -> Tensor:
    return torch.stack([torch.randperm(D)[:r] for _ in range(heads)])


def label(segment: UncompressedSegment, channels: Tensor) -> None:
    segment.add_index(LabelIndex({0: channels.tolist()}), 0)


def agree(segment: UncompressedSegment, key: Tensor, chosen: Tensor, rows: list[int]) -> None:
    """Scores of labels are products over the chosen channels of each key head."""
    query = torch.randn(len(rows), 6, 2, D).to(key.dtype)
    groups, (a, z) = 6 // key.shape[1], (3, key.shape[2])
    parts = chosen[None, :, None].expand(len(rows), -1, z, -1)
    asked = chosen.repeat_interleave(groups, 0)[None, :, None].expand(len(rows), -1, 2, -1)
    expected = reference.scores(query.gather(3, asked), key[rows].gather(3, parts)[:, :, a:])
    got = segment.indexes["labels"].scores(query, rows, a, z)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("r", [1, 8, 13, D])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_labels_are_channels_of_the_keys_whenever_they_are_asked_for(r, scattered, before):
    chosen = channels(2, r)
    if before:
        segment = UncompressedSegment(2, torch.empty(0, D), D, None)
        segment.add_sequences(2)
        label(segment, chosen)
        key = torch.randn(2, 2, 150, D)
        for a, z in ((0, 100), (100, 101), (101, 150)):
            segment.append([0, 1], key[:, :, a:z], key[:, :, a:z], torch.arange(a, z).expand(2, -1))
    else:
        segment, key, _ = filled(2, 2, 150, torch.float32, scattered)
        label(segment, chosen)
    assert isinstance(segment, Indexed)
    agree(segment, key, chosen, [0, 1])
    agree(segment, key, chosen, [1])


@pytest.mark.parametrize("by_head", [False, True])
def test_labels_go_where_their_tokens_go(by_head):
    segment, key, _ = filled(2, 2, 150, torch.float32, False)
    chosen = channels(2, 8)
    label(segment, chosen)
    copied = copy.deepcopy(segment)
    slots = lists(1, 2, 1, 150, 90)[0, :, 0] if by_head else torch.arange(150)[::2]
    segment.keep(1, slots)
    each = slots if by_head else slots.expand(2, -1)
    moved = torch.cat([key[:1, :, : each.shape[1]], key[1:].gather(2, each[None, ..., None].expand(-1, -1, -1, D))])
    agree(segment, moved, chosen, [1])
    agree(segment, key, chosen, [0])
    segment.select([1, 1])
    agree(segment, moved[[1, 1]], chosen, [0, 1])
    segment.truncate(0, 40)
    new = torch.randn(1, 2, 30, D)
    segment.append([0], new, new, torch.arange(30)[None])
    agree(segment, torch.cat([moved[1:, :, :40], new], dim=2), chosen, [0])
    agree(segment, moved[[1, 1]], chosen, [1])
    agree(copied, key, chosen, [0, 1])


def test_merged_tokens_are_labelled_anew():
    segment = filled(1, 2, 100, torch.float32, False)[0]
    chosen = channels(2, 8)
    label(segment, chosen)
    merged = torch.randn(2, 50, D)
    segment.keep(0, torch.arange(50), (merged, merged))
    agree(segment, merged[None], chosen, [0])


def test_labels_cost_their_channels_and_nothing_else():
    """32 of 128 channels in bfloat16 are 64 bytes per token and key head, of 512 for key and value."""
    like = torch.empty(0, 128, dtype=torch.bfloat16)
    bare, labelled = (UncompressedSegment(4, like, 128, None) for _ in range(2))
    for segment in (bare, labelled):
        segment.add_sequences(1)
    label(labelled, torch.arange(32).expand(4, -1))
    for segment in (bare, labelled):
        rows = torch.zeros(1, 4, 640, 128, dtype=torch.bfloat16)
        segment.append([0], rows, rows, torch.arange(640)[None])
    slots = len(labelled.pool.owners) * 64
    channels_held = 4 * 32 * 8
    assert labelled.nbytes - bare.nbytes == slots * 64 + channels_held
    assert bare.pool.keys.nbytes + bare.pool.values.nbytes == slots * 512
