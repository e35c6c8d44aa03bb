"""ThinK: the proofs of its card (arXiv 2407.21018)."""

from itertools import combinations
from typing import Any

import pytest
import tiny
import torch
from selecting import DIM, Fed
from torch import Tensor

from kvote import MethodError
from kvote.spec import parse
from kvote.store.prompt import PromptSegment
from kvote.store.segment import Scaling
from kvote.store.thin import FewerChannels, ThinBody, channel_scores, kept_channels
from kvote.tokens import Queries, TokenSet

N, WINDOW, RECENT = 150, 8, 12
SPEC = f"think(window={WINDOW}, recent={RECENT}, ratio="
HEADS = [(4, 2), (2, 2), (6, 1), (8, 4)]


def published_mask(query: Tensor, key: Tensor, ratio: float) -> Tensor:
    """The published lines for one key head: query [w, d] and key [n, d] to a mask [d], True where a channel stays."""
    scores = query.square().mean(0) * key.square().mean(0)
    lowest = torch.topk(scores, int(ratio * key.shape[1]), largest=False).indices
    return torch.ones(key.shape[1]).bool().index_fill(0, lowest, False)


def masks(fed: Fed, ratio: float, n: int = N, row: int = 0, held: Tensor | None = None) -> Tensor:
    """What must stay, [h, d], where the first prompt has ``n`` tokens of which ``held`` [h, m] were not dropped."""
    query, key = (fed.rotated(x, 0, n)[row] for x in (fed.query, fed.key))
    groups = len(query) // len(key)
    kept = []
    for head in range(len(key)):
        queries = query[head * groups : (head + 1) * groups, -WINDOW:].reshape(-1, DIM)
        kept.append(published_mask(queries, key[head] if held is None else key[head, held[head].long()], ratio))
    return torch.stack(kept)


def body_of(fed: Fed, row: int = 0) -> ThinBody:
    segment = fed.layer.segment
    assert isinstance(segment, PromptSegment)
    body = segment.bodies[row]
    assert isinstance(body, ThinBody)
    return body


def channels(fed: Fed, row: int = 0) -> list[list[int]]:
    return body_of(fed, row).channels.tolist()


def thinned(fed: Fed, mask: Tensor, count: int, thin: int = N - RECENT, row: int = 0) -> Tensor:
    """What the last ``count`` rows must answer, [t, heads, d], where the first ``thin`` keys have lost channels."""
    query, key = (fed.rotated(x, 0, fed.at)[row] for x in (fed.query, fed.key))
    key[:, :thin] *= mask[:, None]
    groups = len(query) // len(key)
    key, value = (x.repeat_interleave(groups, 0) for x in (key, fed.value[row, :, : fed.at]))
    logits = query[:, -count:] @ key.transpose(1, 2) / DIM**0.5
    seen = torch.ones(count, fed.at).tril(fed.at - count).bool()
    return (logits.masked_fill(~seen, float("-inf")).softmax(-1) @ value).transpose(0, 1)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.6])
def test_the_channels_are_those_of_the_published_lines(heads, kv_heads, ratio):
    fed = Fed(f"{SPEC}{ratio})", heads, kv_heads, rows=2, n=N)
    # Channels of unlike size, so that the choice is not between near-equals.
    fed.key *= torch.rand(kv_heads, 1, DIM) + 0.2
    fed.feed(N)
    for row in range(2):
        expected = masks(fed, ratio, row=row)
        assert channels(fed, row) == [head.nonzero()[:, 0].tolist() for head in expected]
        query, key = (fed.rotated(x, 0, N)[row] for x in (fed.query, fed.key))
        scores = channel_scores(query[:, -WINDOW:], key)
        assert all(bool(s[m].min() >= s[~m].max()) for s, m in zip(scores, expected, strict=True))
        assert int((~expected).sum()) == kv_heads * int(ratio * DIM)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.9])
def test_decode_steps_and_later_turns_are_attention_over_masked_keys(heads, kv_heads, ratio):
    fed = Fed(f"{SPEC}{ratio})", heads, kv_heads, rows=2, n=N + 40)
    prompt = fed.feed(N)
    torch.testing.assert_close(prompt, fed.dense(N), atol=1e-5, rtol=1e-5)
    for count in (1, 1, 20, 1):
        got = fed.feed(count)
        for row in range(2):
            expected = thinned(fed, masks(fed, ratio, row=row), count, row=row)
            torch.testing.assert_close(got[row], expected, atol=1e-5, rtol=1e-5)
        if ratio == 0:
            torch.testing.assert_close(got, fed.dense(count), atol=1e-5, rtol=1e-5)
    assert len(channels(fed)[0]) == DIM - int(ratio * DIM)


def test_scores_of_packed_keys_are_those_of_masked_ones():
    fed = Fed(f"{SPEC}0.4)", n=N + 1)
    fed.feed(N)
    fed.feed(1)
    query, key = fed.rotated(fed.query, N, N + 1)[:, :, :1], fed.rotated(fed.key, 0, N + 1)
    key[:, :, : N - RECENT] *= masks(fed, 0.4)[:, None]
    got = fed.layer.segment.scores(query, [0], 3, N + 1)
    torch.testing.assert_close(
        got[0, 0], torch.einsum("hd,hnd->hn", query[0, :, 0], key[0].repeat_interleave(2, 0)[:, 3:])
    )
    held, values = fed.layer.segment.decode([0], 0, N + 1)
    torch.testing.assert_close(held, key)
    assert torch.equal(values, fed.value[:, :, : N + 1])


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_query_heads_that_read_their_own_lists_read_masked_keys(heads, kv_heads, blocks):
    fed = Fed(f"{SPEC}0.4)", heads, kv_heads, rows=2, n=N + 20)
    fed.feed(N)
    fed.feed(20)
    segment, query = fed.layer.segment, torch.randn(2, heads, blocks, DIM)
    # Encoded tokens and later ones, in every list others.
    index = torch.rand(2, heads, blocks, N + 20).argsort(-1)[..., :40].sort(-1).values
    encoded = index < N - RECENT
    assert bool((encoded.any(-1) & ~encoded.all(-1)).all())
    key, value = fed.rotated(fed.key, 0, N + 20), fed.value
    key[:, :, : N - RECENT] *= torch.stack([masks(fed, 0.4, row=row) for row in range(2)])[:, :, None]
    key, value = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value))
    logits = query @ key.transpose(-1, -2) / DIM**0.5
    logits = logits.masked_fill(~torch.zeros(logits.shape, dtype=torch.bool).scatter(3, index, True), float("-inf"))
    asked = Queries(query), [0, 1], TokenSet(index, causal=False), Scaling(DIM**-0.5)
    out, lse = segment.attend(*asked)
    torch.testing.assert_close(out, logits.softmax(-1) @ value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, logits.logsumexp(-1), atol=1e-5, rtol=1e-5)
    mass = segment.attention_mass(asked[0], lse, *asked[1:])
    torch.testing.assert_close(mass, logits.softmax(-1).gather(3, index), atol=1e-5, rtol=1e-5)


def test_a_score_is_the_frobenius_norm_of_a_channels_part_of_the_scores():
    query, key = torch.randn(6, 9, 5).double(), torch.randn(2, 30, 5).double()
    got = channel_scores(query, key)
    for head in range(2):
        for channel in range(5):
            parts = [torch.outer(q[:, channel], key[head, :, channel]) for q in query[3 * head : 3 * head + 3]]
            norm = torch.stack(parts).square().sum()
            torch.testing.assert_close(got[head, channel].double(), norm / (27 * 30), rtol=1e-5, atol=0)


def test_no_other_choice_of_channels_loses_less_where_channels_are_orthogonal():
    query, key = torch.randn(1, 9, 7), torch.linalg.qr(torch.randn(30, 7)).Q * (torch.rand(7) + 0.1)
    kept = kept_channels(channel_scores(query, key[None]), 3)[0].tolist()
    whole = query[0] @ key.T

    def lost(chosen: Any) -> float:
        return float((whole - query[0][:, chosen] @ key[:, chosen].T).square().sum())

    others = sorted(lost(list(chosen)) for chosen in combinations(range(7), 4))
    assert lost(kept) == pytest.approx(others[0], rel=1e-4)
    assert others[1] > 1.01 * others[0]


@pytest.mark.parametrize("passes", [[100, 50], [149, 1], [145, 5], [1] * 3 + [147], [50] * 3], ids=str)
def test_an_announced_prompt_is_scored_once_by_its_last_queries(passes):
    fed = Fed(f"{SPEC}0.4)", n=N)
    for count in passes:
        before = fed.layer.segment
        assert before is None or before.bodies == [None]
        _feed(fed, count, N - fed.at - count)
    assert channels(fed) == [head.nonzero()[:, 0].tolist() for head in masks(fed, 0.4)]
    assert fed.layer.segment.waiting[0].queries == []


def _feed(fed: Fed, count: int, prompt_left: int) -> None:
    """A single token in the middle of a prompt is not a generated one."""
    attend = fed.layer.attend
    fed.layer.attend = lambda step: attend(type(step)(**{**vars(step), "prompt_left": prompt_left, "decode": False}))
    fed.feed(count)
    fed.layer.attend = attend


def test_nothing_is_scored_again():
    fed = Fed(f"{SPEC}0.4)", n=N + 100)
    fed.feed(N)
    body = body_of(fed)
    for count in (1, 60, 1):
        fed.feed(count)
    assert body_of(fed) is body
    held = fed.layer.segment.decode([0], 0, N + 62)[0]
    assert torch.equal(held[:, :, N - RECENT :], fed.rotated(fed.key, N - RECENT, N + 62))
    assert bool((held[:, :, : N - RECENT] == 0).any())


def test_a_first_prompt_that_is_short_leaves_it_to_the_next():
    fed = Fed(f"{SPEC}0.4)", n=N)
    fed.feed(RECENT)
    fed.feed(1)
    assert fed.layer.segment.bodies == [None]
    fed.feed(N - RECENT - 1)
    assert channels(fed) == [head.nonzero()[:, 0].tolist() for head in masks(fed, 0.4)]


@pytest.mark.parametrize("per_head", [True, False])
def test_dropping_comes_first_and_the_queries_are_the_original_ones(per_head):
    fed = Fed(f"snapkv(budget=60, window=6, per_head={per_head}) | {SPEC}0.4)", n=N + 1)
    fed.feed(N)
    held = torch.stack(fed.layer.segment.positions(0))
    assert held.shape == (2, 60)
    assert fed.layer.activity.dropped == N - 60
    mask = masks(fed, 0.4, held=held)
    assert channels(fed) == [head.nonzero()[:, 0].tolist() for head in mask]
    assert body_of(fed).positions.shape[1] == 60 - RECENT
    key = fed.rotated(fed.key, 0, N)[0]
    key = torch.stack([head[slots.long()] for head, slots in zip(key, held, strict=True)])
    key[:, : 60 - RECENT] *= mask[:, None]
    torch.testing.assert_close(fed.layer.segment.decode([0], 0, 60)[0][0], key)


def test_heads_that_keep_unlike_many_encoded_tokens_lose_nothing_more():
    """What is encoded is equally long in all heads; surplus tokens move behind it without a change."""
    fed = Fed(f"{SPEC}0.4)", rows=2, n=N + 7)
    fed.feed(N)
    for _ in range(5):
        fed.feed(1)
    segment = fed.layer.segment
    before = [part[1].clone() for part in segment.decode([1, 1], 0, N + 5)]
    places = torch.stack(segment.positions(1))
    slots = torch.stack(
        [torch.tensor([*range(0, 130, 2), *range(140, 155)]), torch.tensor([*range(5, 60), *range(130, 155)])]
    )
    segment.keep(1, slots)
    assert segment.encoded(1) == 63
    assert [lane.tolist() for lane in segment.positions(1)] == [
        p[s].tolist() for p, s in zip(places, slots, strict=True)
    ]
    for mine, old in zip(segment.decode([1], 0, 80), before, strict=True):
        expected = torch.stack([head[s] for head, s in zip(old, slots, strict=True)])
        assert torch.equal(mine[0], expected)
    segment.keep(1, torch.arange(3, 80))
    assert (segment.encoded(1), segment.length(1)) == (60, 77)
    content = torch.randn(2, 70, DIM), torch.randn(2, 70, DIM)
    segment.keep(1, torch.arange(70), content)
    key, value = segment.decode([1], 0, 70)
    assert torch.equal(value[0], content[1])
    assert torch.equal(key[0, :, 60:], content[0][:, 60:])
    gone = key[0, :, :60] == 0
    assert int(gone.sum()) == 2 * 60 * int(0.4 * DIM)
    assert torch.equal(key[0, :, :60], content[0][:, :60].masked_fill(gone, 0))


def test_heavy_hitters_drop_thinned_tokens_step_by_step():
    fed = Fed(f"h2o(budget=60) | {SPEC}0.4)", n=N + 30)
    fed.feed(N)
    mask = masks(fed, 0.4, held=torch.stack(fed.layer.segment.positions(0)))
    for _ in range(30):
        held = torch.stack(
            [torch.cat([lane, torch.tensor([fed.at])]) for lane in fed.layer.segment.positions(0)]
        ).long()
        got = fed.feed(1)
        query, key = fed.rotated(fed.query, fed.at - 1, fed.at)[0, :, 0], fed.rotated(fed.key, 0, fed.at)[0]
        for head in range(4):
            own = held[head // 2]
            keys = key[head // 2, own] * torch.where(own[:, None] < N - RECENT, mask[head // 2], True)
            expected = (keys @ query[head] / 4).softmax(0) @ fed.value[0, head // 2, own]
            torch.testing.assert_close(got[0, 0, head], expected, atol=1e-5, rtol=1e-5)
    assert fed.layer.activity.dropped == N + 30 - 60
    assert body_of(fed).positions.shape[1] < 60 - RECENT


def test_rolled_back_into_its_prompt_a_sequence_stays_thin():
    net = tiny.model()
    cache = tiny.cache(net, f"{SPEC}0.4)")
    tiny.feed(net, cache, tiny.ids(2, N))
    segment = cache.managed[0].segment
    before, size = segment.decode([0, 1], 0, 100), cache.nbytes()
    cache.crop(-50)
    assert [segment.length(row) for row in (0, 1)] == [segment.encoded(row) for row in (0, 1)] == [100, 100]
    assert all(torch.equal(mine, old) for mine, old in zip(segment.decode([0, 1], 0, 100), before, strict=True))
    assert cache.nbytes() < size
    logits = tiny.feed(net, cache, tiny.ids(2, 30, seed=4))
    assert bool(logits.isfinite().all())
    cache.crop(-130)
    assert segment.bodies == [None, None]
    again = tiny.feed(net, cache, tiny.ids(2, N))
    torch.testing.assert_close(again, tiny.feed(net, tiny.cache(net, "dense"), tiny.ids(2, N)), atol=1e-4, rtol=1e-4)
    assert all(body is not None for body in segment.bodies)


@pytest.mark.parametrize("stay", [0, 2, 5])
def test_drafts_behind_an_announced_prompt_have_no_say(stay):
    net = tiny.model()
    one, other = (tiny.cache(net, f"{SPEC}0.4)") for _ in range(2))
    tiny.feed(net, one, tiny.ids(1, N))
    other.expect(N)
    other.activate_past_recording()
    tiny.feed(net, other, torch.cat([tiny.ids(1, N), tiny.ids(1, 5, seed=3)], dim=1))
    assert other.managed[0].segment.bodies == [None]
    other.crop(stay - 5)
    for layer in range(2):
        mine, own = (cache.managed[layer].segment for cache in (one, other))
        assert torch.equal(mine.bodies[0].channels, own.bodies[0].channels)
        assert own.encoded(0) == mine.encoded(0) == N - RECENT
        assert own.length(0) == N + stay


@pytest.mark.parametrize("tokens", [4096, 32768])
@pytest.mark.parametrize("ratio", [0.4, 0.6])
def test_bytes_fall_as_the_formula_says(tokens, ratio):
    """kept of 128 channels of every key but the last, values whole, and 4 bytes of position."""
    segment = FewerChannels(ratio, 32, 32).new_segment(2, torch.empty(1, 2, 1, 128, dtype=torch.bfloat16), 128, None)
    segment.add_sequences(1)
    segment.reserve(tokens)
    key = torch.randn(1, 2, 1024, 128).bfloat16()
    for start in range(0, tokens, 1024):
        prompt_left = tokens - start - 1024
        segment.append([0], key, key, torch.arange(start, start + 1024)[None])
        segment.observe_queries(Queries(key), [0], prompt_left)
        raw = segment.nbytes
        segment.compress(prompt_left)
    kept = 128 - int(ratio * 128)
    body = segment.bodies[0]
    assert body.keys.nbytes == 2 * kept * 2 * 64 * -(-(tokens - 32) // 64)
    formula = 2 * ((tokens - 32) * (2 * kept + 256 + 4) + 32 * (512 + 4))
    assert segment.nbytes == pytest.approx(formula, rel=0.02 if tokens > 5000 else 0.06)
    assert segment.nbytes < raw * (kept + 129) / 256


def test_generation_with_padding_beams_and_samples_acts_row_by_row():
    net = tiny.model()
    tokens, mask = tiny.padded(2, 60, [9, 0])
    for way in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}):
        cache = tiny.cache(net, f"{SPEC}0.4)")
        out = tiny.generate(net, tokens, cache, mask, **way)
        bodies = cache.managed[1].segment.bodies
        assert [body.positions.shape[1] for body in bodies] == [51 - RECENT] * 3 + [60 - RECENT] * 3
        for row, sequence in enumerate(out.sequences if "do_sample" in way else []):
            alone = tiny.cache(net, f"{SPEC}0.4)")
            logits = [tiny.feed(net, alone, sequence[None, 9 if row < 3 else 0 : 60])[:, -1]]
            logits += [tiny.feed(net, alone, sequence[None, i : i + 1])[:, -1] for i in range(60, 67)]
            for mine, own in zip(logits, out.logits, strict=True):
                torch.testing.assert_close(mine[0], own[row], atol=1e-4, rtol=1e-4)


def _all_queries(queries: Tensor, key: Tensor) -> Tensor:
    return key.float().square().mean(dim=1)


def _not_the_keys(queries: Tensor, key: Tensor) -> Tensor:
    return queries.float().square().reshape(len(key), -1, key.shape[2]).mean(dim=1)


@pytest.mark.parametrize("fault", [_all_queries, _not_the_keys])
def test_a_fault_in_the_score_shows(monkeypatch, fault):
    monkeypatch.setattr("kvote.store.thin.channel_scores", fault)
    with pytest.raises(AssertionError):
        test_the_channels_are_those_of_the_published_lines(4, 2, 0.4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("think(ratio=1.0)", "ratio must be a share of the channels"),
        ("think(ratio=-0.1)", "ratio must be"),
        ("think(ratio='half')", "ratio must be"),
        ("think(ratio=True)", "ratio must be"),
        ("think(window=0)", "window must be a whole number of at least 1"),
        ("think(recent=-1)", "recent must be a whole number of at least 0"),
        ("think(recent=1.5)", "recent must be"),
        ("think | tokenselect", "reader needs them without rotation"),
        ("streamingllm | think", "reader needs them without rotation"),
        ("think | think", "both decide what to store"),
    ],
)
def test_what_makes_no_sense_is_refused(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)
