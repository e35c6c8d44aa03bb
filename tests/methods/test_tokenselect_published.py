"""``tokenselect(published=True)``: the rule of the paper and its code, beside kvote's own."""

import pytest
import tiny
import torch
from selecting import Fed, spec, winners

from kvote import MethodError
from kvote.spec import parse

WINDOW = 8


def published(**changes):
    given = {"window": WINDOW, "published": True, "tail": None, **changes}
    return spec(**{name: value for name, value in given.items() if value is not None}).replace("tail=0, ", "")


def test_chunks_and_steps_choose_before_the_window_that_ends_with_them(trace):
    fed = Fed(published(), heads=8)
    fed.feed(56)
    fed.feed(1)
    # Up to 16 tokens are sinks, winners and window together, and read whole.
    cuts = [(16 + 8 * i, 24 + 8 * i) for i in range(5)] + [(56, 57)]
    for (a, b), votes, index in zip(cuts, trace.votes, trace.selected, strict=True):
        torch.testing.assert_close(votes.flatten(), fed.votes(a, b, b - WINDOW, "paper"), atol=1e-4, rtol=1e-3)
        assert index.flatten().tolist() == [0, 1, *winners(votes.flatten()), *range(b - WINDOW, b)]


def test_queries_answer_from_those_tokens(trace):
    fed = Fed(published())
    fed.feed(48)
    out = fed.feed(8)
    seen = trace.selected[-1].flatten()
    for row in range(8):
        visible = seen[: len(seen) - 7 + row]
        expected = fed.attended(visible, 48 + row, len(visible) - 1)
        torch.testing.assert_close(out[0, row], expected[0], atol=1e-4, rtol=1e-3)


def test_a_text_that_fits_is_read_whole():
    fed = Fed(published())
    torch.testing.assert_close(fed.feed(16), fed.dense(16), atol=1e-5, rtol=1e-5)
    assert fed.layer.activity.selections == 0


@pytest.mark.parametrize(("tail", "selections"), [(None, 5), (3, 5 + 3)])
def test_no_token_selects_alone_unless_a_tail_is_given(tail, selections):
    net, tokens = tiny.model(), tiny.ids(1, 56)
    cache = tiny.cache(net, published(tail=tail))
    tiny.feed(net, cache, tokens)
    # Of seven chunks, two are read whole.
    assert [layer.selections for layer in cache.report().layers] == [selections] * 2


def test_a_selection_serves_as_long_as_the_query_allows_and_what_leaves_the_window_is_lost(trace):
    fed = Fed(published(theta=0.9), n=200)
    fed.query[:, :, 100:] = fed.query[:, :, 100:101]
    fed.feed(100)
    trace.clear()
    for _ in range(90):
        fed.feed(1)
    assert fed.layer.activity.reused == 89
    first = trace.selected[0].flatten().tolist()
    assert trace.selected[-1].flatten().tolist() == [*first[:8], *range(190 - WINDOW, 190)]
    # The query of the last step is replaced: another selection.
    fed.query[:, :, 190] = -fed.query[:, :, 189]
    fed.feed(1)
    assert fed.layer.activity.reused == 89


def test_a_decision_on_the_device_is_the_same(trace):
    lists = []
    for unasked in (False, True):
        torch.manual_seed(3)
        fed = Fed(published(theta=0.5), n=120)
        fed.feed(60)
        fed.query[:, :, 60:] = fed.query[:, :, 60:61] + 0.8 * torch.randn_like(fed.query[:, :, 60:])
        reader = fed.layer.method.read
        if unasked:
            object.__setattr__(reader, "_renew", reader._renew_unasked)
        trace.clear()
        for _ in range(60):
            fed.feed(1)
        lists.append([index.flatten().tolist() for index in trace.selected])
        assert 5 < int(fed.layer.activity.reused) < 55
    assert lists[0] == lists[1]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("tokenselect(published=1)", "published must be True or False"),
        ("tokenselect(published=True, reuse_span=32)", "leave reuse_span out"),
        ("tokenselect(published=True, window=64)", "give window of at least 512, or a smaller chunk"),
    ],
)
def test_what_the_published_rule_does_not_have_is_refused(spec, reason):
    with pytest.raises(MethodError, match=reason):
        parse(spec)


def test_pairing_and_tail_may_be_given():
    method = parse("tokenselect(published=True, tail=40, head_map='gqa')")
    assert (method.read.tail, method.read.head_map, method.read.window_from) == (40, "gqa", "end")
    assert parse("tokenselect").read == parse("tokenselect(tail=40, reuse_span=32, head_map='gqa')").read
