"""Sketches are of keys less what the keys of a lane have in common, which changes no vote."""

import pytest
import torch
from torch import Tensor

from kvote.index.sketch import SketchIndex
from kvote.kernels import cpu, reference
from kvote.kernels.lanes import PAGE
from kvote.store.uncompressed import UncompressedSegment

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
HEADS, GROUPS, DIM, N, K = 2, 2, 32, 600, 10


def keys(common: float, n: int = N) -> Tensor:
    """Keys [1, h, n, d] with a large part in common, another one for each head, towards and against the queries."""
    random = torch.Generator().manual_seed(1)
    shift = common * torch.randn(1, HEADS, 1, DIM, generator=random)
    return shift + torch.randn(1, HEADS, n, DIM, generator=random)


def queries() -> Tensor:
    return torch.randn(1, HEADS * GROUPS, 1, DIM, generator=torch.Generator().manual_seed(2))


def segment(bits: int, key: Tensor, passes: list[int] | None = None) -> UncompressedSegment:
    held = UncompressedSegment(HEADS, key, DIM, None)
    held.add_sequences(1)
    held.add_index(SketchIndex(bits), 0)
    at = 0
    for t in passes or [key.shape[2]]:
        part = key[:, :, at : at + t]
        held.append([0], part, part, torch.arange(at, at + t)[None])
        at += t
    return held


def codes(held: UncompressedSegment) -> list[Tensor]:
    """Bytes of the whole pages of every lane."""
    coded = held.indexes["sketch"].coded
    assert coded is not None
    return [coded[0][torch.from_numpy(lane.page_ids()[: lane.length // PAGE])] for lane in held.pool.lanes]


@pytest.mark.parametrize("common", [0.0, 30.0])
def test_votes_from_an_8_bit_sketch_are_near_those_of_the_keys_whatever_keys_have_in_common(common):
    held = segment(8, keys(common))
    exact = held.votes(queries(), [0], 0, [N])
    voted = held.indexes["sketch"].votes(queries(), [0], 0, [N])
    assert float((voted - exact).abs().sum()) < 0.05 * float(exact.sum())


@pytest.mark.parametrize("common", [0.0, 30.0])
def test_nominees_are_scored_as_all_others_are_whatever_keys_have_in_common(common):
    held = segment(4, keys(common))
    exact = held.winners(queries(), [0], 0, [N], K)
    assert torch.equal(held.indexes["sketch"].winners(queries(), [0], 0, [N], K, 4 * K), exact)


def test_scores_that_lack_the_centre_would_make_others_win():
    """What the test above would notice."""
    key, query = keys(30.0), queries()
    rough = reference.scores(query, key - reference.centre(key, PAGE))[0, 0]
    exact = reference.scores(query, key)[0, 0]
    nominated = reference.soft_votes(rough).topk(4 * K).indices
    wrong = reference.rescored(rough, exact[:, nominated], nominated)
    won = nominated[wrong.topk(K).indices]
    assert set(won.tolist()) != set(reference.soft_votes(exact).topk(K).indices.tolist())


@pytest.mark.parametrize("passes", [[N], [1] * 70 + [N - 70], [63, 1, N - 64], [64, N - 64], [40, 300, N - 340]])
def test_the_centre_is_that_of_the_first_page_however_tokens_came(passes):
    for one, other in zip(codes(segment(8, keys(30.0))), codes(segment(8, keys(30.0), passes)), strict=True):
        assert torch.equal(one, other)


def test_what_is_cropped_into_the_first_page_gets_a_new_centre_when_that_is_full_again():
    other = keys(-30.0)
    held = segment(8, keys(30.0))
    held.truncate(0, 20)
    held.append([0], other[:, :, 20:], other[:, :, 20:], torch.arange(20, N)[None])
    fresh = segment(8, torch.cat([keys(30.0)[:, :, :20], other[:, :, 20:]], dim=2))
    assert all(torch.equal(one, two) for one, two in zip(codes(held), codes(fresh), strict=True))


def test_within_the_first_page_the_keys_themselves_decide():
    """The centre that sketches were made about is not known there."""
    held = segment(4, keys(30.0))
    exact = held.winners(queries(), [0], 0, [50], 3)
    assert torch.equal(held.indexes["sketch"].winners(queries(), [0], 0, [50], 3, 12), exact)
