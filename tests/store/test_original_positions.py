"""Keys that are held without rotation, read where they stood in the text."""

import pytest
import tiny
import torch
from selecting import Fed, spec

from kvote import kernels
from kvote.rope import Rope
from kvote.store.answers import angles_at
from kvote.store.uncompressed import UncompressedSegment

COMPILED = kernels.backend() == "cpu"
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 64,
}


@pytest.mark.skipif(not COMPILED, reason="compares the compiled kernels with the law")
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("cohere", {}),
        ("phi3-partial", {}),
        ("phi3", {"rope_parameters": LONG, "max_position_embeddings": 256}),
    ],
    ids=["llama", "interleaved", "partial", "longrope"],
)
@pytest.mark.parametrize("pads", [None, [0, 7]], ids=["whole", "padded"])
@pytest.mark.parametrize("method", ["{}", "kivi(residual=32) | {}", "randomkeep(budget=40, window=6) | {}"])
def test_pages_and_the_law_answer_alike(monkeypatch, family, changes, pads, method):
    method = method.format(spec(positions="original", tail=9))
    tokens, mask = tiny.padded(2, 90, pads) if pads else (tiny.ids(2, 90), None)
    both = []
    for backend in ("reference", "cpu"):
        monkeypatch.setenv("KVOTE_BACKEND", backend)
        net = tiny.model(family, **changes)
        cache = tiny.cache(net, method)
        parts = [tiny.feed(net, cache, part, mask) for part in tokens.split([60, 20, *[1] * 10], dim=1)]
        both.append(torch.cat(parts, dim=1))
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(both[0][real], both[1][real], atol=2e-4, rtol=2e-4)


def test_a_place_is_computed_once_for_all_heads_and_queries_of_a_tail(monkeypatch):
    fed, asked, once = Fed(spec(positions="original", tail=20), heads=4, kv_heads=2), [], Rope.once
    fed.feed(40)
    monkeypatch.setattr(Rope, "once", lambda self, at: (asked.append(at.numel()), once(self, at))[1])
    fed.feed(20, tail_queries=20)
    assert len(asked) == 1
    assert asked[0] <= 60


@pytest.mark.skipif(not COMPILED, reason="without compiled kernels, keys are copied before they are read")
def test_a_tail_is_read_from_the_pages_without_a_copy_of_its_keys(monkeypatch):
    fed = Fed(spec(positions="original", tail=20))
    fed.feed(40)
    monkeypatch.setattr(UncompressedSegment, "read", lambda *args: pytest.fail("keys were copied"))
    fed.feed(20, tail_queries=20)
    fed.feed(1)


def test_heads_that_hold_different_tokens_are_read_at_places_of_their_own():
    fed = Fed(spec(positions="original", top_k=60))
    fed.feed(40)
    segment = fed.layer.segment
    kept = torch.stack([torch.arange(0, 20), torch.arange(20, 40)])
    segment.keep(0, kept)
    assert not segment.alike
    out = fed.feed(1)[0, 0]
    query, key = fed.rotated(fed.query, 40, 41), fed.rotated(fed.key, 0, 41)
    for head in range(4):
        seen = [*kept[head // 2].tolist(), 40]
        weights = torch.softmax(key[0, head // 2, seen] @ query[0, head, 0] * 16**-0.5, dim=0)
        torch.testing.assert_close(out[head], weights @ fed.value[0, head // 2, seen], atol=1e-5, rtol=1e-4)


def test_angles_are_those_that_the_model_used_last():
    net = tiny.model("phi3", rope_parameters=LONG, max_position_embeddings=256)
    cache = tiny.cache(net, spec(positions="original"))
    tiny.feed(net, cache, tiny.ids(1, 80))
    rope, places = cache.managed[0].rope, torch.tensor([[3, 70, 3], [5, 5, 79]])
    used = net.model.rotary_emb(torch.empty(0), torch.arange(80)[None])
    cos, sin = angles_at(rope, places)
    torch.testing.assert_close(cos, used[0][0, places, : cos.shape[-1]])
    torch.testing.assert_close(sin, used[1][0, places, : sin.shape[-1]])
