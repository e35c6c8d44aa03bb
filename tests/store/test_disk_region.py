"""Tokens on a disk, in front of tokens in memory that differ by key head."""

import tiny
import torch

from kvote.hf.facts import find_rope
from kvote.store.offloaded import OffloadedSegment
from kvote.store.segment import Scaling
from kvote.store.uncompressed import UncompressedSegment
from kvote.tokens import Queries, TokenSet

HEADS, DIM, N = 2, 16, 150


def test_key_heads_that_keep_other_tokens_stand_where_they_did(tmp_path):
    torch.manual_seed(0)
    rope, like = find_rope(tiny.model(), 0), torch.empty(0, DIM)
    near = UncompressedSegment(HEADS, like, DIM, rope)
    far = OffloadedSegment(HEADS, like, DIM, rope, folder=str(tmp_path), recent=20)
    key, value = torch.randn(1, HEADS, N, DIM), torch.randn(1, HEADS, N, DIM)
    own = [[*range(128), *range(130, 145)], [*range(128), *range(135, 150)]]
    for segment in (near, far):
        segment.add_sequences(1)
        segment.append([0], key, value, torch.arange(N)[None])
        segment.compress(0)
        segment.keep(0, torch.tensor(own))
    assert far.encoded(0) == 128
    assert [lane.tolist() for lane in far.positions(0)] == own
    query = torch.randn(1, 2 * HEADS, 1, DIM)
    tokens = TokenSet(torch.arange(len(own[0]))[None, None], causal=False, positions="original")
    answers = [segment.attend(Queries(query, query), [0], tokens, Scaling(0.25)) for segment in (near, far)]
    for mine, its in zip(*answers, strict=True):
        torch.testing.assert_close(mine, its, atol=1e-5, rtol=1e-5)
