"""Methods that drop tokens, joined with methods that read a few of those that stay."""

import copy

import pytest
import tiny
import torch
from selecting import Fed

import kvote
from kvote import MethodError
from kvote.kernels.lanes import Lanes
from kvote.spec import parse

READ = "tokenselect(top_k=5, sinks=2, window=6, chunk=4, tail=3, theta=2.0)"
KEEP = {"h2o": "h2o(budget=24, per_head=False)", "snapkv": "snapkv(budget=24, window=6, per_head=False)"}


@pytest.fixture(params=KEEP.values(), ids=KEEP)
def keep(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
@pytest.mark.parametrize("read", ["tokenselect", "random"])
def test_tokens_of_its_own_per_head_cannot_be_read_by_one_list(name, read):
    for spec in (f"{name} | {read}", f"{read} | {name}"):
        with pytest.raises(MethodError, match=r"differ from head to head.*write per_head=False") as caught:
            parse(spec)
        assert name in str(caught.value)
        assert read in str(caught.value)
    assert parse(f"{name}(per_head=False) | {read}").read == parse(read).read


@pytest.mark.parametrize("passes", [0, 9])
def test_both_act(keep, passes):
    net = tiny.model()
    cache = tiny.cache(net, f"{keep} | {READ}")
    cache.expect(90)
    tiny.feed(net, cache, tiny.ids(2, 90), passes=passes)
    before = cache.report().layers[0].selections
    tiny.feed(net, cache, tiny.ids(2, 5, seed=1), passes=1)
    for layer in cache.report().layers:
        assert layer.dropped >= 2 * (90 - 24)
        assert layer.selections >= before + 10
        assert layer.tokens_read <= 2 + 5 + 6 + 1
        assert layer.tokens_held <= 2 * (24 + 5)
    for row in cache.positions(1):
        assert all(torch.equal(lane, row[0]) for lane in row)


def test_budgets_that_cover_everything_are_dense_attention():
    tokens, mask = tiny.padded(2, 40, [7, 0])
    expected = tiny.generate(tiny.model(), tokens, mask=mask)
    for keep in ("h2o(budget=60, per_head=False)", "snapkv(budget=60, per_head=False)"):
        net = tiny.model()
        cache = tiny.cache(net, f"{keep} | tokenselect(top_k=60, sinks=2, window=6)")
        assert torch.equal(tiny.generate(net, tokens, cache, mask).sequences, expected.sequences)


def test_winners_are_elected_among_the_tokens_held(keep):
    """What a decode step answers is attention over sinks, winners and window of what is held, at contiguous places."""
    fed = Fed(f"{keep} | {READ}", n=91)
    fed.feed(90)
    held = fed.layer.segment.positions(0)[0].tolist()
    assert len(held) == 24
    got = fed.feed(1)
    reader = fed.layer.method.read
    held = [*held, 90]
    edge = len(held) - 1 - reader.window
    angles = fed.rope.angles(torch.tensor([[reader.window]]), torch.float32)
    query = fed.rope.apply(fed.query[0, :, 90:91], (angles[0][0], angles[1][0]))[:, 0]
    votes = torch.zeros(edge - 2)
    for head in range(4):
        votes += torch.softmax(fed.key[0, head // 2, held[2:edge]] @ query[head], dim=0)
    winners = sorted((votes.topk(5).indices + 2).tolist())
    seen = torch.tensor([held[slot] for slot in [0, 1, *winners, *range(edge, len(held))]])
    torch.testing.assert_close(got[:, 0], fed.attended(seen, 90, len(seen) - 1), atol=1e-4, rtol=1e-4)


def test_a_selection_is_not_reused_once_tokens_have_moved():
    """Slots remembered from before a drop would name other tokens."""
    net = tiny.model()
    again = READ.replace("theta=2.0", "theta=-1.0")
    moved, still = (tiny.cache(net, f"{name}(budget=110, per_head=False) | {again}") for name in ("h2o", "snapkv"))
    for cache in (moved, still):
        tiny.feed(net, cache, tiny.ids(1, 150))
        before = cache.report().layers[0].selections
        tiny.feed(net, cache, tiny.ids(1, 6, seed=1), passes=1)
        report = cache.report().layers[0]
        assert (report.selections - before, report.reused) == ((6, 0) if cache is moved else (1, 5))


@pytest.mark.parametrize("sketch", ["int8", "int4"])
def test_sketches_stay_those_of_the_keys(keep, sketch):
    net = tiny.model()
    cache = tiny.cache(net, f"{keep} | tokenselect(top_k=5, sinks=2, window=6, chunk=4, sketch='{sketch}')")
    tiny.feed(net, cache, tiny.ids(2, 90))
    tiny.feed(net, cache, tiny.ids(2, 4), passes=1)
    assert cache.report().layers[0].dropped > 0
    segment = cache.managed[0].segment
    if sketched := segment.indexes.get("sketch"):
        codes, bits = sketched.coded
        again = codes.clone()
        for lane in segment.pool.lanes:
            kvote.kernels.cpu.sketch(segment.pool.keys, again, bits, Lanes([lane.runs]), 0, lane.length)
        assert torch.equal(again, codes)


@pytest.mark.parametrize("method", ["h2o(budget=20)", "snapkv(budget=20, window=6)", f"{KEEP['snapkv']} | {READ}"])
@pytest.mark.parametrize(
    "way", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}], ids=["beams", "samples"]
)
def test_beams_and_samples_run_as_rows_of_their_own(method, way):
    """Every sequence that comes out is one that a cache of its own would have given the same logits for."""
    net = tiny.model()
    tokens, mask = tiny.padded(2, 40, [9, 0])
    cache = tiny.cache(net, method)
    out = tiny.generate(net, tokens, cache, mask, **way)
    assert cache.report().layers[0].dropped > 0
    if "do_sample" in way:
        for row, sequence in enumerate(out.sequences):
            alone = tiny.cache(net, method)
            prompt = sequence[None, 9 if row < 3 else 0 : 40]
            logits = [tiny.feed(net, alone, prompt)[:, -1]]
            logits += [tiny.feed(net, alone, sequence[None, i : i + 1])[:, -1] for i in range(40, 47)]
            for mine, own in zip(logits, out.logits, strict=True):
                torch.testing.assert_close(mine[0], own[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["h2o(budget=20)", "snapkv(budget=20, window=6)", f"{KEEP['h2o']} | {READ}"])
def test_a_document_is_asked_from_a_copy(method):
    from test_document import TEXT, Words

    document = kvote.Document(tiny.model(), Words(), TEXT, method, tokens_per_pass=64)
    before = [lane.tolist() for lane in document.cache.positions(1)[0]]
    assert all(len(lane) <= 24 for lane in before)
    one = document.ask("w1 w2 w3", max_new_tokens=6)
    document.ask("w30 w31", max_new_tokens=6)
    assert document.ask("w1 w2 w3", max_new_tokens=6).token_ids == one.token_ids
    assert [lane.tolist() for lane in document.cache.positions(1)[0]] == before
    assert copy.deepcopy(document.cache).nbytes() == document.cache.nbytes()
