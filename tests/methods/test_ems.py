"""EMS-style, reconstructed (arXiv 2412.08521): the proofs of its card."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from selecting import DIM, Fed
from torch import Tensor
from watching import received, weights

from kvote import MethodError
from kvote.keep.evict import Evict
from kvote.keep.merge import into_similar, merging
from kvote.keep.merge.into_similar import IntoSimilar
from kvote.keep.merge.merging import Tokens, assign, merged
from kvote.spec import parse

N, BUDGET, WINDOW, SINKS = 64, 24, 8, 2
SPEC = f"ems(budget={BUDGET}, window={WINDOW}, sinks={SINKS}"


def alike(fed: Fed, kinds: int = 6, noise: float = 0.3) -> Fed:
    """Keys and values of a few kinds, so that tokens resemble others."""
    n = fed.key.shape[2]
    kind = torch.randint(0, kinds, (n,), generator=torch.Generator().manual_seed(5))
    for name in ("key", "value"):
        held = getattr(fed, name)
        setattr(fed, name, held[:, :, :kinds][:, :, kind] + noise * torch.randn_like(held))
    return fed


def rotated(fed: Fed, x: Tensor, places: list[int], back: bool = False) -> Tensor:
    """Float64 [n, d] rotated to positions, or back from them."""
    cos, sin = (a[0].double() for a in fed.rope.angles(torch.tensor([places]), torch.float32))
    a, b = x.double().chunk(2, dim=-1)
    sin = -sin if back else sin
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


@dataclass
class Head:
    """One key head, token by token, in float64."""

    places: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    overall_mass: list[float] = field(default_factory=list)
    recent_mass: list[float] = field(default_factory=list)
    merged: int = 0


@dataclass
class Slow:
    """The card's steps, one after the other. Nothing of kvote is used."""

    fed: Fed
    threshold: float = 0.5
    remove: bool = True
    factor: float = 2.0
    row: int = 0
    heads: list[Head] = field(default_factory=list)

    def run(self, passes: list[int]) -> None:
        fed, at = self.fed, 0
        self.heads = [Head() for _ in range(fed.key.shape[1])]
        groups = fed.query.shape[1] // fed.key.shape[1]
        for number, count in enumerate(passes):
            for h, head in enumerate(self.heads):
                first = len(head.places)
                for token in range(at, at + count):
                    head.places.append(token)
                    head.keys.append(rotated(fed, fed.key[self.row, h, token : token + 1], [token])[0])
                    head.values.append(fed.value[self.row, h, token].double())
                    head.overall_mass.append(0.0)
                    head.recent_mass.append(0.0)
                for i in range(count):
                    keys = torch.stack(head.keys[: first + i + 1])
                    for member in range(h * groups, (h + 1) * groups):
                        query = rotated(fed, fed.query[self.row, member, at + i : at + i + 1], [at + i])[0]
                        for slot, share in enumerate(torch.softmax(keys @ query * DIM**-0.5, 0).tolist()):
                            head.overall_mass[slot] += share
                            if number or i >= count - WINDOW:
                                head.recent_mass[slot] += share
                limit = BUDGET + (WINDOW if number else 0)
                if len(head.places) <= BUDGET:
                    head.recent_mass = [0.0] * len(head.places)
                if len(head.places) > limit:
                    self.shrink(head)
            at += count

    def shrink(self, head: Head) -> None:
        n = len(head.places)
        mean, recent = sum(head.overall_mass) / n, sum(head.recent_mass) / n
        score = [max(g * recent / mean, s) for g, s in zip(head.overall_mass, head.recent_mass, strict=True)]
        ranked = sorted(range(SINKS, n - WINDOW), key=lambda slot: -score[slot])
        important = BUDGET - SINKS - WINDOW
        stays = sorted([*range(SINKS), *ranked[:important], *range(n - WINDOW, n)])
        classes: dict[int, list[int]] = {centre: [centre] for centre in stays}
        keys = torch.stack(head.keys)
        if self.remove:
            keys = rotated(self.fed, keys, head.places, back=True)
        for slot in ranked[important : important + int(self.factor * important)]:
            best, most = -1, -1.0
            for centre in stays:
                one = torch.cosine_similarity(keys[slot], keys[centre], 0).item()
                other = torch.cosine_similarity(head.values[slot], head.values[centre], 0).item()
                likeness = 0.0 if one < 0 and other < 0 else one * other
                if likeness > most:
                    best, most = centre, likeness
            if most >= self.threshold:
                classes[best].append(slot)
                head.merged += 1
        new = Head(merged=head.merged)
        for centre, members in classes.items():
            total = sum(score[slot] for slot in members)
            share = [score[slot] / total for slot in members]
            direction = sum(a * keys[s] / keys[s].norm() for a, s in zip(share, members, strict=True))
            length = sum(a * keys[s].norm() for a, s in zip(share, members, strict=True))
            key = direction / direction.norm() * length
            new.keys.append(rotated(self.fed, key[None], [head.places[centre]])[0] if self.remove else key)
            new.values.append(sum(a * head.values[s] for a, s in zip(share, members, strict=True)))
            new.places.append(head.places[centre])
            new.overall_mass.append(total)
            new.recent_mass.append(0.0)
        head.__dict__.update(new.__dict__)


def kept(fed: Fed, row: int = 0) -> list[list[int]]:
    return [lane.tolist() for lane in fed.layer.segment.positions(row)]


PASSES = {"prompt": [N], "generating": [40] + [1] * 24, "from nothing": [1] * N}


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (6, 1)])
@pytest.mark.parametrize("remove", [True, False])
def test_what_is_held_equals_a_slow_loop_over_heads_and_tokens(passes, heads, kv_heads, remove):
    fed = alike(Fed(f"{SPEC}, remove_positions={remove})", heads, kv_heads, rows=2))
    for count in passes:
        fed.feed(count)
    for row in range(2):
        slow = Slow(fed, remove=remove, row=row)
        slow.run(passes)
        assert kept(fed, row) == [head.places for head in slow.heads]
        key, value = (x[0] for x in fed.layer.segment.decode([row], 0, fed.layer.segment.length(row)))
        for h, head in enumerate(slow.heads):
            assert head.merged > 0
            torch.testing.assert_close(key[h].double(), torch.stack(head.keys), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(value[h].double(), torch.stack(head.values), atol=1e-4, rtol=1e-4)
            worth = fed.layer.record.memory.overall_mass.rows[row][h]
            torch.testing.assert_close(worth.double(), torch.tensor(head.overall_mass).double(), atol=1e-3, rtol=1e-3)


def test_scores_come_from_the_column_sums_of_the_attention_matrix(monkeypatch):
    fed, scores = Fed(f"{SPEC})"), []
    merged = IntoSimilar.merged

    def observe_queries(self: IntoSimilar, held: Any, memory: Any, cut: Any) -> Any:
        scores.append(cut.worth)
        return merged(self, held, memory, cut)

    monkeypatch.setattr(IntoSimilar, "merged", observe_queries)
    fed.feed(N)
    whole = weights(fed.rotated(fed.query, 0, N), fed.rotated(fed.key, 0, N), DIM**-0.5)
    overall_mass, recent_mass = received(whole, 2)[0], received(whole[:, :, -WINDOW:], 2)[0]
    aligned = overall_mass * recent_mass.mean(1, keepdim=True) / overall_mass.mean(1, keepdim=True)
    torch.testing.assert_close(scores[0], torch.maximum(aligned, recent_mass), atol=1e-5, rtol=1e-5)
    # Neither of the two decides alone.
    assert 0.05 < (aligned > recent_mass).float().mean() < 0.95


@pytest.mark.parametrize("passes", [[N + 5], [40, N - 35], [N - 3, 8]], ids=str)
def test_all_queries_are_counted_however_passes_are_cut(monkeypatch, passes):
    monkeypatch.setattr(Evict, "survivors", lambda *_: None)
    net, tokens, found = tiny.model(), tiny.ids(2, N + 5), []
    for sizes in (passes, [N] + [1] * 5):
        cache, at = tiny.cache(net, f"{SPEC})"), 0
        cache.expect(N)
        for size in sizes:
            tiny.feed(net, cache, tokens[:, at : at + size])
            at += size
        found.append([layer.record.memory for layer in cache.managed])
    for mine, one_by_one in zip(*found, strict=True):
        for row in range(2):
            for kind in ("overall_mass", "recent_mass"):
                torch.testing.assert_close(getattr(mine, kind).rows[row], getattr(one_by_one, kind).rows[row])
        # Every query of 2 query heads per key head has a weight of 1 to give.
        assert mine.overall_mass.rows[0].sum().item() == pytest.approx(2 * 2 * (N + 5), rel=1e-4)
        assert mine.recent_mass.rows[0].sum().item() == pytest.approx(2 * 2 * (WINDOW + 5), rel=1e-4)


def test_queries_behind_a_prompt_do_not_count_where_generated_ones_do_not():
    net = tiny.model()
    cache = tiny.cache(net, "ems(budget=200, window=8, evict_generated=False)")
    cache.expect(N)
    tiny.feed(net, cache, tiny.ids(1, N + 5))
    for layer in cache.managed:
        assert layer.record.memory.overall_mass.rows[0].sum().item() == pytest.approx(2 * 2 * N, rel=1e-4)


def of_kind(kind: str) -> Any:
    """A model whose frequencies change at 96 tokens. Positions are those of the text's own tokens."""
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": 10_000.0, "factor": 4.0}
    if kind == "dynamic":
        return tiny.model(rope_parameters=parameters, max_position_embeddings=96)
    parameters |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 96}
    return tiny.model(rope_parameters=parameters, max_position_embeddings=384)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
@pytest.mark.parametrize("lengths", [[150], [80, 150], [150, 60]], ids=str)
def test_rotations_that_depend_on_the_largest_position_are_removed(monkeypatch, kind, lengths):
    net, n = of_kind(kind), max(lengths)
    tokens, mask = tiny.padded(len(lengths), n, [n - length for length in lengths])
    cache, dense = tiny.cache(net, f"ems(budget={BUDGET}, window={WINDOW}, merge=0.3, threshold=0.05)"), tiny.cache(net)
    tiny.feed(net, dense, tokens, mask)
    frequencies = net.model.rotary_emb.inv_freq.clone()
    compared, merge = [], IntoSimilar.join

    def observe_queries(self: IntoSimilar, held: Any, score: Tensor, kept: Tensor, others: Tensor) -> Any:
        length = lengths[held.row]
        rotated = dense.managed[held.layer].segment.decode([held.row], 0, length)[0][0].double()
        angle = torch.arange(length)[:, None] * frequencies.double()
        scaling = net.model.rotary_emb.attention_scaling
        cos, sin = angle.cos() / scaling, angle.sin() / scaling
        a, b = rotated.chunk(2, dim=-1)
        plain = torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)

        heads = iter(range(len(plain)))

        def compare(centres: Tokens, alike: Tokens, threshold: float) -> Tensor:
            head = next(heads)
            for mine, slots in ((centres, kept), (alike, others)):
                torch.testing.assert_close(mine.key[0], plain[head, slots[head]].float(), atol=1e-4, rtol=1e-4)
            compared.append(held.row)
            return assign(centres, alike, threshold)

        monkeypatch.setattr(into_similar, "assign", compare)
        return merge(self, held, score, kept, others)

    monkeypatch.setattr(IntoSimilar, "join", observe_queries)
    tiny.feed(net, cache, tokens, mask)
    assert sorted(compared) == sorted(list(range(len(lengths))) * 2 * net.config.num_key_value_heads)
    assert torch.equal(net.model.rotary_emb.inv_freq, frequencies)
    assert not torch.equal(net.model.rotary_emb.original_inv_freq, frequencies)


@pytest.mark.parametrize("nothing", ["threshold=1.01", "merge=0"])
def test_without_merging_it_only_drops(nothing):
    one, other = Fed(f"{SPEC}, threshold=0.2)"), Fed(f"{SPEC}, {nothing})")
    for name in ("key", "value", "query"):
        setattr(other, name, getattr(alike(one) if name == "key" else one, name))
    for fed in (one, other):
        fed.feed(N)
    assert kept(one) == kept(other)
    key, value = (x[0] for x in other.layer.segment.decode([0], 0, BUDGET))
    slots = torch.tensor(kept(other))[..., None].expand(-1, -1, DIM)
    assert torch.equal(value, other.value[0].gather(1, slots))
    assert torch.equal(key, other.rotated(other.key, 0, N)[0].gather(1, slots))
    slow = Slow(other, threshold=1.01)
    slow.run([N])
    assert kept(other) == [head.places for head in slow.heads]
    changed = (one.layer.segment.decode([0], 0, BUDGET)[1][0] != value).any(-1).sum(-1)
    assert bool((changed > 0).all())


def random_tokens(h: int, n: int, seed: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(h, n, c, generator=generator) for c in (16, 8)]
    return Tokens(*parts, torch.rand(h, n, generator=generator))


def test_equal_tokens_merge_into_themselves():
    centres = random_tokens(3, 10, 0)
    twins = centres.take(torch.tensor([[0, 4, 4], [1, 2, 3], [9, 9, 9]]))
    twins = Tokens(twins.key, twins.value, torch.rand(3, 3))
    into = assign(centres, twins, 0.99)
    assert into.tolist() == [[0, 4, 4], [1, 2, 3], [9, 9, 9]]
    new = merged(centres, twins, into)
    assert torch.equal(new.value, centres.value)
    torch.testing.assert_close(new.key, centres.key, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(new.score.sum(1), centres.score.sum(1) + twins.score.sum(1))


@pytest.mark.parametrize("held", [1, 500, 1 << 22])
def test_one_scatter_for_all_heads_equals_a_loop(monkeypatch, held):
    monkeypatch.setattr(merging, "_SIMILAR_HELD", held)
    centres, others = random_tokens(3, 12, 1), random_tokens(3, 30, 2)
    into = assign(centres, others, 0.1)
    new = merged(centres, others, into)
    counts = (into >= 0).sum(1).tolist()
    assert len(set(counts)) > 1
    for h in range(3):
        for i in range(30):
            one = torch.cosine_similarity(others.key[h, i], centres.key[h], -1)
            other = torch.cosine_similarity(others.value[h, i], centres.value[h], -1)
            likeness = torch.where((one < 0) & (other < 0), 0.0, one * other)
            assert into[h, i] == (likeness.argmax() if likeness.max() >= 0.1 else -1)
        for c in range(12):
            keys = torch.cat([centres.key[h, c : c + 1], others.key[h, into[h] == c]])
            values = torch.cat([centres.value[h, c : c + 1], others.value[h, into[h] == c]])
            score = torch.cat([centres.score[h, c : c + 1], others.score[h, into[h] == c]])
            share = (score / score.sum())[:, None]
            norms = keys.norm(dim=1, keepdim=True)
            direction = (share * keys / norms).sum(0)
            key = direction / direction.norm() * (share * norms).sum()
            torch.testing.assert_close(new.key[h, c], key, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(new.value[h, c], (share * values).sum(0), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(new.score[h, c], score.sum())
            assert norms.min() - 1e-4 <= new.key[h, c].norm() <= norms.max() + 1e-4


def test_two_negative_cosines_are_no_likeness():
    centre = Tokens(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]]), torch.ones(1, 1))
    opposite = Tokens(-centre.key, -centre.value, torch.ones(1, 1))
    assert assign(centre, opposite, 0.1).tolist() == [[-1]]
    assert assign(centre, centre, 0.1).tolist() == [[0]]


def test_of_equally_similar_centres_the_first_takes_a_token():
    """A word that comes again and again has the same key and value but for rounding, which must not decide."""
    one = random_tokens(1, 1, 0)
    centres = one.take(torch.zeros(1, 4, dtype=torch.int64))
    shaken = Tokens(centres.key * (1 + 1e-6 * torch.randn(centres.key.shape)), centres.value, centres.score)
    assert assign(shaken, one, 0.5).tolist() == [[0]]


def test_importance_of_nothing_shares_equally():
    centre = Tokens(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[2.0]]]), torch.zeros(1, 1))
    other = Tokens(torch.tensor([[[4.0, 0.0]]]), torch.tensor([[[4.0]]]), torch.zeros(1, 1))
    new = merged(centre, other, torch.zeros(1, 1, dtype=torch.int64))
    assert (new.key.tolist(), new.value.tolist(), new.score.tolist()) == ([[[3.0, 0.0]]], [[[3.0]]], [[0.0]])


def counting(found: list[int]) -> Any:
    """``assign``, with how many tokens it has merged written down."""

    def count(*args: Any) -> Tensor:
        into = assign(*args)
        found.append(int((into >= 0).sum()))
        return into

    return count


def test_equal_tokens_apart_in_the_text_merge_only_without_their_rotation():
    """What a token says again 40 tokens later has another rotation, and would not be recognised with it."""
    found: dict[bool, list[int]] = {True: [], False: []}
    for remove in found:
        fed = Fed(f"{SPEC}, threshold=0.95, remove_positions={remove})", heads=2)
        fed.key[:, :, 40:56], fed.value[:, :, 40:56] = fed.key[:, :, 4:20], fed.value[:, :, 4:20]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(into_similar, "assign", counting(found[remove]))
            fed.feed(N)
        if remove:
            key = fed.layer.segment.decode([0], 0, BUDGET)[0][0]
            slots = torch.tensor(kept(fed))[..., None].expand(-1, -1, DIM)
            torch.testing.assert_close(key, fed.rotated(fed.key, 0, N)[0].gather(1, slots), atol=1e-4, rtol=1e-4)
    assert sum(found[True]) > 3 * sum(found[False])


def test_bytes_are_those_of_the_budget():
    net = tiny.model()
    cache, dense = tiny.cache(net, "ems(budget=128, window=16, threshold=0.1)"), tiny.cache(net)
    for either in (cache, dense):
        tiny.feed(net, either, tiny.ids(2, 2000))
    for layer in cache.managed:
        lanes = layer.segment.pool.lanes
        assert [lane.length for lane in lanes] == [128] * 4
        # Two pages for each head of each sequence; what else is held waits to be given back.
        assert sum(lane.pages for lane in lanes) == 8
        entries = 128 * 2 * 2 * 2 * DIM * 4
        assert entries <= layer.segment.nbytes <= 2.5 * entries
    assert cache.nbytes() < dense.nbytes() / 5


@pytest.mark.parametrize("length", [1, 20, BUDGET])
def test_prompts_that_fit_are_kept_whole_and_dense(length):
    net = tiny.model()
    cache = tiny.cache(net, f"{SPEC})")
    steps = BUDGET + WINDOW - length
    got = tiny.generate(net, tiny.ids(2, length), cache, max_new_tokens=steps)
    expected = tiny.generate(tiny.model(), tiny.ids(2, length), max_new_tokens=steps)
    assert torch.equal(got.sequences, expected.sequences)
    assert cache.report().layers[0].dropped == 0


def test_generated_tokens_are_merged_a_window_at_a_time():
    net = tiny.model()
    cache = tiny.cache(net, f"{SPEC}, threshold=0.1)")
    tiny.feed(net, cache, tiny.ids(1, N))
    sizes = []
    for step in range(1, 25):
        tiny.feed(net, cache, tiny.ids(1, 1, seed=step))
        sizes.append(len(cache.positions(0)[0][0]))
        assert cache.get_seq_length() == N + step
        lane = cache.positions(0)[0][0].tolist()
        assert lane[:SINKS] == list(range(SINKS))
        assert lane[-WINDOW:] == list(range(N + step - WINDOW, N + step))
    assert sizes == [BUDGET + step % (WINDOW + 1) for step in range(1, 25)]


def test_generated_tokens_can_be_left_alone():
    net = tiny.model()
    cache = tiny.cache(net, f"{SPEC}, evict_generated=False)")
    tiny.feed(net, cache, tiny.ids(1, N))
    tiny.feed(net, cache, tiny.ids(1, 20), passes=1)
    assert [layer.tokens_held for layer in cache.report().layers] == [BUDGET + 20] * 2
    tiny.feed(net, cache, tiny.ids(1, 12, seed=2))
    assert [layer.tokens_held for layer in cache.report().layers] == [BUDGET] * 2


def test_the_same_tokens_in_all_heads_serve_a_reader_of_one_list():
    net = tiny.model()
    keep = f"{SPEC}, per_head=False, threshold=0.1)"
    cache = tiny.cache(net, f"{keep} | tokenselect(top_k=5, sinks=2, window=6, chunk=4)")
    tiny.generate(net, tiny.ids(2, N), cache, max_new_tokens=20)
    for layer, report in zip(cache.managed, cache.report().layers, strict=True):
        assert report.dropped > 2 * (N - BUDGET)
        assert report.selections > 0
        assert all(torch.equal(lane, lanes[0]) for lanes in cache.positions(layer.index) for lane in lanes)


@pytest.mark.parametrize("remove", [True, False])
def test_pages_shared_with_other_sequences_are_not_written(remove):
    net = tiny.model()
    cache = tiny.cache(net, f"{SPEC}, threshold=0.1, remove_positions={remove})")
    tiny.feed(net, cache, tiny.ids(1, N))
    tiny.feed(net, cache, tiny.ids(1, WINDOW, seed=1), passes=1)
    cache.batch_repeat_interleave(2)
    segment = cache.managed[0].segment
    before = [part.clone() for part in segment.decode([1], 0, BUDGET)]
    # Only the first sequence is cut down: the second one stays as it was.
    layer = cache.managed[0]
    kept_ = Evict.survivors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evict, "survivors", lambda s, held, m: None if held.row else kept_(s, held, m))
        tiny.feed(net, cache, tiny.ids(1, 1, seed=2).expand(2, -1))
    assert (segment.length(0), segment.length(1)) == (BUDGET, BUDGET + WINDOW + 1)
    assert all(torch.equal(a, b) for a, b in zip(before, segment.decode([1], 0, BUDGET), strict=True))
    assert layer.activity.dropped == N - BUDGET + WINDOW + 1


@pytest.mark.parametrize(
    "way", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=["beams", "samples"]
)
def test_beams_and_samples_run_as_rows_of_their_own(way):
    net = tiny.model()
    tokens, mask = tiny.padded(2, 40, [9, 0])
    cache = tiny.cache(net, f"{SPEC}, threshold=0.1)")
    out = tiny.generate(net, tokens, cache, mask, max_new_tokens=14, **way)
    assert cache.report().layers[0].dropped > 2 * 3 * (40 - BUDGET)
    for row, sequence in enumerate(out.sequences if "do_sample" in way else []):
        alone = tiny.cache(net, f"{SPEC}, threshold=0.1)")
        logits = [tiny.feed(net, alone, sequence[None, 9 if row < 3 else 0 : 40])[:, -1]]
        logits += [tiny.feed(net, alone, sequence[None, i : i + 1])[:, -1] for i in range(40, 53)]
        for mine, own in zip(logits, out.logits, strict=True):
            torch.testing.assert_close(mine[0], own[row], atol=1e-4, rtol=1e-4)


def _unweighted(centres: Tokens, others: Tokens, into: Tensor) -> Tokens:
    same = Tokens(centres.key, centres.value, torch.ones_like(centres.score))
    return merged(same, Tokens(others.key, others.value, torch.ones_like(others.score)), into)


def _no_length(centres: Tokens, others: Tokens, into: Tensor) -> Tokens:
    new = merged(centres, others, into)
    return Tokens(new.key * 0.9, new.value, new.score)


@pytest.mark.parametrize("fault", [_unweighted, _no_length])
def test_a_fault_in_merging_shows(monkeypatch, fault):
    monkeypatch.setattr(into_similar, "merged", fault)
    with pytest.raises(AssertionError):
        test_what_is_held_equals_a_slow_loop_over_heads_and_tokens([N], 4, 2, True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ems(budget='many')", "budget must be"),
        ("ems(budget=36)", "budget must exceed the 4 sinks and the window of 32"),
        ("ems(window=0)", "window must be a whole number of at least 1"),
        ("ems(sinks=-1)", "sinks must be a whole number of at least 0"),
        ("ems(merge=-1)", "merge must be a finite number of at least 0"),
        ("ems(merge=1e999)", r"merge must be a finite number of at least 0; got inf\.$"),
        ("ems(threshold=1e999)", "threshold must be a finite number above 0"),
        ("ems(threshold=0)", "threshold must be a finite number above 0"),
        ("ems(remove_positions=1)", "remove_positions must be True or False"),
        ("ems(per_head='no')", "per_head must be True or False"),
        ("ems(evict_generated=1)", "evict_generated must be True or False"),
        ("ems | tokenselect", "differ from head to head"),
        ("ems | cake", "both decide what to keep"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)
