"""Random tokens: the baseline that reads as much as TokenSelect."""

import pytest
import tiny
import torch

from kvote.store.uncompressed import UncompressedSegment

SPEC = "random(top_k=6, sinks=2, window=4, chunk=8, tail=3, seed={})".format


@pytest.fixture
def lists(monkeypatch):
    """The token lists read, in order."""
    seen: list[torch.Tensor] = []
    attend = UncompressedSegment.attend

    def spy(self, queries, rows, tokens, scaling):
        if isinstance(tokens.index, torch.Tensor):
            seen.append(tokens.index)
        return attend(self, queries, rows, tokens, scaling)

    monkeypatch.setattr(UncompressedSegment, "attend", spy)
    return seen


def read(lists, spec: str, passes: int = 0, layers: int = 1, rows: int = 1) -> list[torch.Tensor]:
    lists.clear()
    net = tiny.model(num_hidden_layers=layers)
    tiny.feed(net, tiny.cache(net, spec), tiny.ids(rows, 60), passes=passes)
    return list(lists)


def test_lists_are_sinks_window_and_distinct_tokens_between(lists):
    for index in read(lists, SPEC(0)):
        for tokens in index.flatten(0, 1).tolist():
            assert tokens == sorted(set(tokens))
            assert tokens[:2] == [0, 1]
            edge = tokens[8]
            assert tokens[8:] == list(range(edge, edge + len(tokens) - 8))
            assert all(2 <= token < edge for token in tokens[2:8])


def test_it_reads_as_many_tokens_as_tokenselect(lists):
    mine = [index.shape for index in read(lists, SPEC(0))]
    theirs = read(lists, "tokenselect(top_k=6, sinks=2, window=4, chunk=8, tail=3, theta=2.0)")
    assert mine == [index.shape for index in theirs]


def test_the_seed_decides(lists):
    one, same, other = read(lists, SPEC(1)), read(lists, SPEC(1)), read(lists, SPEC(2))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_layers_draw_for_themselves_and_sequences_alike(lists):
    index = read(lists, SPEC(0), layers=2, rows=2)
    half = len(index) // 2
    assert not all(torch.equal(a, b) for a, b in zip(index[:half], index[half:], strict=True))
    assert all(torch.equal(each[0], each[1]) for each in index)


def test_draws_do_not_depend_on_passes(lists):
    spec = "random(top_k=6, sinks=2, window=4, chunk=8, tail=0)"
    whole = read(lists, spec)
    pieces = read(lists, spec, passes=16)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_every_candidate_has_the_same_chance(lists):
    counts = torch.zeros(60)
    for seed in range(40):
        for index in read(lists, f"random(top_k=6, sinks=2, window=4, chunk=60, tail=5, seed={seed})")[-1:]:
            for tokens in index.flatten(0, 1)[-1:]:
                counts[tokens[2:8]] += 1
    assert counts[:2].sum() == counts[55:].sum() == 0
    assert counts[2:55].sum() == 240
    assert counts.max() < 16
