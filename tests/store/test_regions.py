"""Regions side by side read, drop, cut and copy as raw tokens do that hold the same."""

from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import Tensor

from kvote.cache import Cache
from kvote.hf.facts import find_rope
from kvote.store.bodies import Bodies, PlainBody, head_of
from kvote.store.region import Slots
from kvote.store.segment import Scaling
from kvote.store.sequence import RegionSegment
from kvote.store.uncompressed import UncompressedSegment
from kvote.tokens import Queries, TokenSet

HEADS, GROUPS, DIM, N = 2, 2, 16, 90
SCALING = Scaling(DIM**-0.5)


@dataclass(frozen=True)
class Exact(PlainBody):
    """Tokens as they came."""

    key: Tensor
    value: Tensor
    positions: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        return [self.key, self.value, self.positions]

    def read(self, slots: Slots) -> tuple[Tensor, Tensor]:
        if isinstance(slots, range):
            return self.key[:, slots.start : slots.stop], self.value[:, slots.start : slots.stop]
        lists = slots if slots.dim() == 2 else slots.expand(HEADS, -1)
        heads = head_of(lists, HEADS)
        return self.key[heads, lists], self.value[heads, lists]

    def keep(self, slots: Tensor, content: tuple[Tensor, Tensor] | None = None) -> "Exact":
        key, value = self.read(slots) if content is None else content
        return Exact(key, value, self.positions.gather(1, slots))


class Listed(Exact):
    """The same, which reads lists by itself."""

    lists = True


def pair(rotates: bool, kind: type[Exact] = Exact) -> tuple[RegionSegment, UncompressedSegment]:
    """Three sequences in two regions and raw tokens, with borders of their own, and all of them raw."""
    torch.manual_seed(0)
    rope = find_rope(tiny.model(), 0) if rotates else None
    like = torch.empty(0, DIM)
    parts = [Bodies(HEADS, like.device), Bodies(HEADS, like.device)]
    mixed, whole = RegionSegment(HEADS, like, DIM, rope, list(parts)), UncompressedSegment(HEADS, like, DIM, rope)
    key, value = torch.randn(3, HEADS, N, DIM), torch.randn(3, HEADS, N, DIM)
    at = torch.arange(N).expand(3, N)
    mixed.add_sequences(3)
    whole.add_sequences(3)
    whole.append([0, 1, 2], key, value, at)
    for row, borders in enumerate([(30, 70), (30, 70), (0, 41)]):
        places, start = at[row].int().expand(HEADS, -1), 0
        for region, stop in zip(parts, borders, strict=True):
            cut = [part[:, start:stop].clone() for part in (key[row], value[row], places)]
            region.bodies[row] = kind(*cut) if stop > start else None
            start = stop
        mixed.append([row], key[row : row + 1, :, start:], value[row : row + 1, :, start:], at[row : row + 1, start:])
    return mixed, whole


def sets() -> dict[str, TokenSet]:
    generator = torch.Generator().manual_seed(1)
    lists = torch.rand(3, 2, N, generator=generator).topk(40).indices.sort(-1).values
    heads = torch.rand(3, HEADS * GROUPS, 2, N, generator=generator).topk(40).indices.sort(-1).values
    return {
        "all": TokenSet(range(N)),
        "in front": TokenSet(range(5, 60), causal=False),
        "first region": TokenSet(range(20), causal=False),
        "raw": TokenSet(range(75, N)),
        "window": TokenSet(range(N), window=50),
        "side by side": TokenSet(range(10, N), positions="contiguous"),
        "window side by side": TokenSet(range(N), window=35, positions="contiguous"),
        "lists": TokenSet(lists, causal=False),
        "lists side by side": TokenSet(lists, causal=False, positions="contiguous"),
        "lists by head": TokenSet(heads, causal=False),
    }


def check(mixed: RegionSegment, whole: UncompressedSegment, rows: list[int], tokens: TokenSet) -> None:
    rotated, raw = torch.randn(2, len(rows), HEADS * GROUPS, 4, DIM)
    queries = Queries(rotated, raw)
    got, law = (each.attend(queries, rows, tokens, SCALING) for each in (mixed, whole))
    for mine, other in zip(got, law, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5, rtol=2e-5)
    mass, expected = (each.attention_mass(queries, law[1], rows, tokens, SCALING) for each in (mixed, whole))
    torch.testing.assert_close(mass, expected, atol=2e-5, rtol=2e-5)


def same(mixed: RegionSegment, whole: UncompressedSegment, row: int) -> None:
    n = whole.length(row)
    assert mixed.length(row) == n
    for mine, other in zip(mixed.decode([row], 0, n), whole.decode([row], 0, n), strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(torch.stack(mixed.positions(row)), torch.stack(whole.positions(row)))


@pytest.mark.parametrize("kind", [Exact, Listed])
@pytest.mark.parametrize("rotates", [False, True])
@pytest.mark.parametrize("name", sets())
def test_queries_read_what_they_read_in_raw_tokens(name, rotates, kind):
    mixed, whole = pair(rotates, kind)
    tokens = sets()[name]
    check(mixed, whole, [0, 1, 2], tokens)
    one = (
        tokens if isinstance(tokens.index, range) else TokenSet(tokens.index[2:], tokens.causal, None, tokens.positions)
    )
    check(mixed, whole, [2], one)


def test_scores_and_winners_are_those_of_raw_tokens():
    mixed, whole = pair(rotates=False)
    query = torch.randn(3, HEADS * GROUPS, 2, DIM)
    for start, stop in ((0, N), (10, 35), (75, N)):
        got, law = (each.scores(query, [0, 1, 2], start, stop) for each in (mixed, whole))
        torch.testing.assert_close(got, law)
    got, law = (each.winners(query, [0, 1, 2], 3, [60, 80], 9) for each in (mixed, whole))
    assert torch.equal(got, law)


@pytest.mark.parametrize("row", [0, 2])
def test_tokens_go_and_the_rest_stays_in_order(row):
    everything, few = torch.arange(N), torch.arange(0, N, 3)
    # Key heads that keep unlike many tokens of the first region, of the second, or of both.
    unlike = torch.stack([torch.arange(60), torch.arange(30, N)])
    later = torch.stack([torch.arange(60), torch.cat([torch.arange(30), torch.arange(60, N)])])
    for slots in (everything, few, few[few > 40], everything[:75], unlike, later):
        mixed, whole = pair(rotates=False)
        for each in (mixed, whole):
            each.keep(row, slots)
        same(mixed, whole, row)
        content = torch.randn(HEADS, 12, DIM), torch.randn(HEADS, 12, DIM)
        for each in (mixed, whole):
            each.keep(row, torch.arange(2, 14), content)
        same(mixed, whole, row)
    # What is equally long in all heads stays encoded.
    mixed, _ = pair(rotates=False)
    mixed.keep(0, few)
    assert mixed.encoded(0) == sum(few < 70)


@pytest.mark.parametrize("length", [0, 12, 30, 31, 70, 80, N])
def test_sequences_are_cut_and_copied(length):
    mixed, whole = pair(rotates=False)
    for each in (mixed, whole):
        each.truncate(0, length)
        each.select([1, 0, 0, 2])
        each.truncate(2, min(length, 7))
    for row in range(4):
        same(mixed, whole, row)
    assert mixed.encoded(1) == min(length, 70)


def test_packed_tokens_that_were_cut_are_saved_and_loaded(tmp_path):
    net = tiny.model()
    cache = tiny.cache(net, "kivi(residual=32)")
    tiny.feed(net, cache, tiny.ids(1, 200))
    cache.crop(-100)
    cache.save(tmp_path / "cut.kv")
    assert Cache.load(tmp_path / "cut.kv", net).equals(cache)
