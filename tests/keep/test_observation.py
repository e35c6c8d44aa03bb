"""What a keeper sees: the attention that tokens received, without a matrix of queries by tokens."""

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import selecting
import tiny
import torch
from selecting import DIM, Fed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from watching import Watching, received, weights

import kvote
from kvote import kernels
from kvote.keep.observation import Observation
from kvote.kernels import reference
from kvote.method import Method
from kvote.read.recent import SinksAndRecent
from kvote.spec import parse
from kvote.tokens import Span, TokenSet

READERS = {
    "everything": "dense",
    "window": SinksAndRecent(2, 9),
    "winners": "tokenselect(top_k=5, sinks=2, window=6, chunk=4, tail=3)",
    "winners, original": "tokenselect(top_k=5, sinks=2, window=6, chunk=4, tail=3, positions='original')",
    "random": "random(top_k=5, sinks=2, window=6, chunk=16, tail=500)",
}


def watched(reader: Any) -> Method:
    read = parse(reader).read if isinstance(reader, str) else reader
    return Method("watched", keep=Watching(), read=read)


def fed(heads: int = 4, kv_heads: int = 2, rows: int = 1, n: int = 64) -> tuple[Fed, Watching]:
    made = Fed("dense", heads=heads, kv_heads=kv_heads, rows=rows, n=n)
    made.layer.method = watched("dense")
    made.layer.__post_init__()
    return made, made.layer.method.keep


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (7, 1), (32, 2)])
@pytest.mark.parametrize("passes", [[64], [1] * 64, [7] * 9 + [1], [40, 1, 1, 20, 1, 1]], ids=str)
@pytest.mark.parametrize("compiled", [True, False])
def test_attention_received_is_the_column_sum_of_the_weights(monkeypatch, heads, kv_heads, passes, compiled):
    if not compiled:
        monkeypatch.setenv("KVOTE_BACKEND", "reference")
    layer, keeper = fed(heads, kv_heads, rows=2)
    for count in passes:
        layer.feed(count)
    query, key = layer.rotated(layer.query, 0, 64), layer.rotated(layer.key, 0, 64)
    expected = received(weights(query, key, DIM**-0.5), kv_heads)
    for row in range(2):
        torch.testing.assert_close(keeper.total(row, 64), expected[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("passes", [0, 1, 7])
def test_the_weights_of_every_query_head_add_up_to_one(reader, passes):
    net = tiny.model()
    tokens, mask = tiny.padded(3, 70, [11, 0, 66])
    method = watched(reader)
    cache = kvote.Cache(net, method)
    tiny.feed(net, cache, tokens, mask, passes)
    assert len(method.keep.seen) >= 2
    for seen, mass in method.keep.seen:
        groups = net.config.num_attention_heads // seen.segment.heads
        expected = torch.full(mass.shape[:2], float(seen.count * groups))
        torch.testing.assert_close(mass.sum(-1), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt-oss", "gemma3", "phi3-partial", "cohere"])
def test_models_of_every_kind_show_their_attention(family):
    """Learned sinks take their share: there, and only there, the weights add up to less than one."""
    net = tiny.model(family)
    method = watched("dense")
    tiny.feed(net, kvote.Cache(net, method), tiny.ids(2, 30), passes=9)
    for seen, mass in method.keep.seen:
        share = mass.sum(-1) / (seen.count * net.config.num_attention_heads / seen.segment.heads)
        assert bool((share < 0.999).all() if family == "gpt-oss" else (share - 1).abs().max() < 1e-3)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_some_query_rows_give_what_they_alone_gave(reader):
    net = tiny.model()
    method = watched(reader)
    cache = kvote.Cache(net, method)
    tiny.feed(net, cache, tiny.ids(2, 40))
    tiny.feed(net, cache, tiny.ids(2, 23, seed=1))
    for seen, whole in method.keep.seen:
        edges = [0, 1, 4, 13, seen.count]
        parts = [seen.mass(a, b) for a, b in pairwise(edges)]
        torch.testing.assert_close(torch.stack(parts).sum(0), whole, atol=1e-4, rtol=1e-4)
        assert seen.mass(5, 5).sum() == 0
        assert bool((seen.mass(3, 4)[:, :, seen.first + 4 :] == 0).all())


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (2, 2), (7, 1)])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_the_weights_of_a_few_rows_are_those_of_the_matrix(monkeypatch, heads, kv_heads, softcap):
    logits = selecting.Scaling
    monkeypatch.setattr(selecting, "Scaling", lambda scale: logits(scale, softcap))
    layer, keeper = fed(heads, kv_heads, rows=2)
    for count in (40, 1, 23):
        layer.feed(count)
    query, key = layer.rotated(layer.query, 0, 64), layer.rotated(layer.key, 0, 64)
    expected = weights(query, key, DIM**-0.5, softcap).float()
    for seen, _ in keeper.seen:
        n = seen.first + seen.count
        for a, b in [(0, seen.count), (seen.count // 2, seen.count)]:
            got = seen.weights(a, b)
            assert got.shape == (2, heads, b - a, n)
            torch.testing.assert_close(got, expected[:, :, seen.first + a : seen.first + b, :n], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
def test_the_weights_of_rows_add_up_to_the_attention_received(reader, family):
    net = tiny.model(family)
    method = watched(reader)
    cache = kvote.Cache(net, method)
    tiny.feed(net, cache, tiny.ids(2, 40))
    tiny.feed(net, cache, tiny.ids(2, 23, seed=1))
    for seen, whole in method.keep.seen:
        rows = torch.cat([seen.weights(0, 7), seen.weights(7, seen.count)], dim=2)
        h = whole.shape[1]
        torch.testing.assert_close(rows.unflatten(1, (h, -1)).sum(dim=(2, 3)), whole, atol=1e-4, rtol=1e-4)


def test_members_of_a_group_give_what_the_group_gives():
    layer, keeper = fed(6, 2)
    layer.feed(64)
    seen, whole = keeper.seen[0]
    parts = [seen.member(i).mass() for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(parts[0], parts[1], atol=1e-2)


def test_members_read_the_lists_of_their_own_heads():
    layer, keeper = fed(6, 2)
    layer.feed(63)
    layer.feed(1)
    seen, _ = keeper.seen[-1]
    lists = torch.stack([torch.arange(i, i + 30) for i in range(6)])[None, :, None]
    own = replace(seen, spans=[Span(0, 1, [TokenSet(lists, causal=False)])])
    parts = [own.member(i).mass() for i in range(3)]
    torch.testing.assert_close(torch.stack(parts).sum(0), own.mass(), atol=1e-5, rtol=1e-4)
    for i, part in enumerate(parts):
        for h in range(2):
            read = part[0, h].nonzero().flatten()
            assert read.tolist() == lists[0, 3 * h + i, 0].tolist()


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_a_cut_observation_is_that_of_the_tokens_that_stay(reader):
    net = tiny.model()
    method = watched(reader)
    cache = kvote.Cache(net, method)
    tiny.feed(net, cache, tiny.ids(2, 40))
    tiny.feed(net, cache, tiny.ids(2, 10, seed=1))
    seen = method.keep.seen[-1][0]
    part = seen.of(1, 46)
    assert (part.rows, part.first, part.count, part.prompt_left) == ([1], 40, 6, 0)
    torch.testing.assert_close(part.mass()[0], seen.mass(0, 6)[1, :, :46], atol=1e-5, rtol=1e-5)
    assert seen.of(0, 40) is None
    copied, before = seen.selected([1, 1, 0]), seen.mass(2, 5)
    cache.reorder_cache(torch.tensor([1, 1, 0]))
    assert [each.rows for each in copied] == [[0], [1], [2]]
    for each, row in zip(copied, [1, 1, 0], strict=True):
        torch.testing.assert_close(each.mass(2, 5)[0], before[row], atol=1e-5, rtol=1e-5)


def faults() -> dict[str, Any]:
    law = reference.attention_mass

    def late(query: Tensor, lse: Tensor, key: Tensor, start: int, limits: list[int], **kw: Any) -> Tensor:
        return law(query, lse, key, start, [limit - 1 for limit in limits], **kw)

    def heads(query: Tensor, lse: Tensor, key: Tensor, *args: Any, **kw: Any) -> Tensor:
        b, heads, t, d = query.shape
        h = key.shape[1]
        query = query.reshape(b, heads // h, h, t, d).transpose(1, 2).reshape(b, heads, t, d)
        return law(query, lse, key, *args, **kw)

    def first_row(query: Tensor, lse: Tensor, *args: Any, **kw: Any) -> Tensor:
        return law(query, lse[:, :, :1].expand_as(lse), *args, **kw)

    def unscaled(*args: Any, **kw: Any) -> Tensor:
        return law(*args, **{**kw, "scale": 1.0})

    return {"one token late": late, "heads paired otherwise": heads, "another row's sum": first_row, "scale": unscaled}


@pytest.mark.parametrize("fault", faults())
def test_a_fault_in_the_observation_shows(monkeypatch, fault):
    monkeypatch.setenv("KVOTE_BACKEND", "reference")
    monkeypatch.setattr(reference, "attention_mass", faults()[fault])
    with pytest.raises(AssertionError):
        test_attention_received_is_the_column_sum_of_the_weights(monkeypatch, 4, 2, [40, 24], False)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("held", [64, 3000, 1 << 22])
def test_the_law_in_blocks_of_any_size_equals_the_matrix(monkeypatch, softcap, held):
    monkeypatch.setattr(reference, "_MASS_HELD", held)
    query, key = torch.randn(2, 6, 50, 16), torch.randn(2, 2, 131, 16)
    whole = weights(query, key, 0.3, softcap)
    _, lse = reference.attend(
        query, key, key, scale=0.3, softcap=softcap, mask=kernels.masks.end_aligned(50, 131, None, query.device)
    )
    got = kernels.attention_mass(query, lse, key, scale=0.3, softcap=softcap)
    torch.testing.assert_close(got, received(whole, 2), atol=1e-4, rtol=1e-4)
    part = kernels.attention_mass(query, lse, key[:, :, :80], scale=0.3, softcap=softcap, causal=False)
    torch.testing.assert_close(part, received(whole, 2)[:, :, :80], atol=1e-4, rtol=1e-4)
    windowed = kernels.attention_mass(query, lse, key, scale=0.3, softcap=softcap, window=9)
    token, row = torch.arange(131), torch.arange(81, 131)[:, None]
    near = whole * ((token <= row) & (token > row - 9))
    torch.testing.assert_close(windowed, received(near, 2), atol=1e-4, rtol=1e-4)


def test_a_row_that_saw_nothing_gives_nothing():
    query, key = torch.randn(1, 2, 3, 16), torch.randn(1, 1, 9, 16)
    lse = torch.tensor([[[float("-inf"), 1.0, 2.0]] * 2])
    got = reference.attention_mass(query, lse, key, 0, [9, 0, 0], scale=0.2, softcap=None)
    assert bool((got == 0).all())


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in entries."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, Tensor):
                self.entries = max(self.entries, made.untyped_storage().nbytes() // made.element_size())
        return out


@pytest.mark.parametrize("method", ["h2o(budget=100)", "snapkv(budget=100)", "cake(budget=100)", "ems(budget=100)"])
def test_no_matrix_of_queries_by_tokens_is_made_for_a_long_prompt(monkeypatch, method):
    monkeypatch.setattr(reference, "_MASS_HELD", 1 << 20)
    net = tiny.model(num_hidden_layers=1)
    tokens = tiny.ids(1, 4000)
    cache = tiny.cache(net, method)
    with Largest() as largest, torch.no_grad():
        net(tokens, past_key_values=cache, logits_to_keep=1)
    assert cache.report().layers[0].dropped == 3900
    assert 0 < largest.entries <= 1 << 20
    assert largest.entries < 4000 * 4000 / 10


def test_what_waits_is_copied_with_the_cache_and_counted():
    net = tiny.model()
    cache = tiny.cache(net, "h2o(budget=20)")
    cache.activate_past_recording()
    tiny.feed(net, cache, tiny.ids(1, 30))
    waiting = cache.managed[0].record.waiting
    assert cache.managed[0].record.nbytes >= sum(t.nbytes for seen in waiting for t in (seen.lse, seen.queries.rotated))
    clone = copy.deepcopy(cache)
    clone.crop(-4)
    assert isinstance(waiting[0], Observation)
    assert (clone.get_seq_length(), cache.get_seq_length()) == (26, 30)
    cache.crop(-4)
    assert [lane.tolist() for lane in clone.positions(0)[0]] == [lane.tolist() for lane in cache.positions(0)[0]]
    assert cache.managed[0].record.waiting == []


def test_rows_of_a_list_for_blocks_of_several_rows_cannot_be_cut():
    tokens = TokenSet(torch.zeros(1, 2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="cannot be cut"):
        tokens.of_rows(4, 1, 2)
