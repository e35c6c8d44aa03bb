"""DuoAttention: the proofs of its card (arXiv 2410.10819), but for the training of gates (tests/calibration)."""

import pytest
import scored
import tiny
import torch
from selecting import DIM
from torch import Tensor

import kvote
from kvote import MethodError
from kvote.calibration.gates import streaming_mask
from kvote.layer import Step
from kvote.method import Method
from kvote.methods import duoattention
from kvote.spec import parse
from kvote.store.segment import Scaling

SINKS, WINDOW = 2, 6
GATES = [[0.9, 0.1], [0.2, 0.8]]


def method(net, gates=GATES, **changes) -> Method:
    return duoattention(heads=scored.duo(net, gates), **{"sinks": SINKS, "window": WINDOW, **changes})


def seen_in_passes(passes: list[int], sinks: int, window: int) -> Tensor:
    """Bool [n, n]: what a streaming head sees of a text in these passes: its own pass, and of what came before the
    sinks and the window."""
    n = sum(passes)
    seen = torch.zeros(n, n, dtype=torch.bool)
    start = 0
    for count in passes:
        for query in range(start, start + count):
            seen[query, start : query + 1] = True
            seen[query, : min(sinks, start)] = True
            seen[query, max(0, start - window) : start] = True
        start += count
    return seen


def masked(query: Tensor, key: Tensor, value: Tensor, masks: list[Tensor]) -> Tensor:
    """Dense attention [b, t, heads, dv] in which the query heads of each key head see what its mask shows."""
    each = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(each, dim=1) for x in (key, value))
    mask = torch.stack(masks).repeat_interleave(each, dim=0)[None]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3)
    return out.transpose(1, 2)


@pytest.mark.parametrize("passes", [[1] * 30, [20] + [1] * 12, [9, 17, 3] + [1] * 4, [5, 5, 30, 2]], ids=str)
def test_every_step_equals_dense_attention_with_a_mask_per_head(passes):
    net, n = tiny.model(num_hidden_layers=1), sum(passes)
    cache = kvote.Cache(net, method(net, [[0.1, 0.9]]))
    layer = cache.layers[0].layer
    query, key, value = torch.randn(2, 4, n, DIM), torch.randn(2, 2, n, DIM), torch.randn(2, 2, n, DIM)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    expected = masked(query, key, value, [seen_in_passes(passes, SINKS, WINDOW), causal])
    start = 0
    for count in passes:
        part = slice(start, start + count)
        places = torch.arange(n)[None, part].expand(2, -1)
        parts = (query[:, :, part], key[:, :, part], value[:, :, part], places)
        got = layer.attend(Step(*parts, None, count, Scaling(0.3), decode=count == 1))
        torch.testing.assert_close(got, expected[:, part], atol=1e-5, rtol=1e-5)
        start += count
    assert cache.report().layers[0].dropped == 2 * (n - SINKS - WINDOW)
    assert not torch.allclose(expected, masked(query, key, value, [causal] * 2), atol=1e-3)


def test_decoded_from_the_start_a_streaming_head_sees_the_mask_that_gates_were_trained_with():
    trained = streaming_mask(40, SINKS, WINDOW + 1, torch.device("cpu"))
    assert torch.equal(seen_in_passes([1] * 40, SINKS, WINDOW), trained)


def test_the_model_with_all_gates_open_is_the_model():
    net = tiny.model()
    tokens = tiny.ids(2, 80)
    expected = tiny.feed(net, None, tokens)
    for passes in (0, 1, 33):
        cache = kvote.Cache(net, method(net, sparsity=0.0))
        torch.testing.assert_close(tiny.feed(net, cache, tokens, passes=passes), expected, atol=1e-4, rtol=1e-4)
        assert cache.is_croppable
        assert cache.report().layers[0].dropped == 0


def test_one_pass_is_read_in_full_and_passes_are_not():
    net = tiny.model()
    tokens = tiny.ids(1, 80)
    expected = tiny.feed(net, None, tokens)
    whole, parts = kvote.Cache(net, method(net)), kvote.Cache(net, method(net))
    torch.testing.assert_close(tiny.feed(net, whole, tokens), expected, atol=1e-4, rtol=1e-4)
    parts.expect(80)
    got = tiny.feed(net, parts, tokens, passes=20)
    torch.testing.assert_close(got[:, :20], expected[:, :20], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got[:, 40:], expected[:, 40:], atol=1e-2)
    assert [lane.tolist() for lane in parts.positions(0)[0]] == [lane.tolist() for lane in whole.positions(0)[0]]


def test_streaming_heads_hold_the_same_bytes_however_long_the_text_at_its_own_positions():
    net = tiny.model()
    cache = kvote.Cache(net, method(net, sinks=4, window=60))
    few = [g.layer for layer in cache.layers for g in layer.layer.head_groups if g.layer.method.keep.offers.drops]
    whole = [g.layer for layer in cache.layers for g in layer.layer.head_groups if not g.layer.method.keep.offers.drops]
    tiny.feed(net, cache, tiny.ids(1, 200))
    held, grown = set(), []
    for start in range(200, 2200, 200):
        tiny.feed(net, cache, tiny.ids(1, 200))
        held.add(sum(layer.nbytes for layer in few))
        grown.append(sum(layer.nbytes for layer in whole))
        assert cache.positions(0)[0][1].tolist() == [0, 1, 2, 3, *range(start + 140, start + 200)]
        assert len(cache.positions(0)[0][0]) == start + 200
    assert len(held) == 1
    assert grown == sorted(grown)
    assert grown[-1] > 4 * grown[0]
    dense = kvote.Cache(net, "dense")
    tiny.feed(net, dense, tiny.ids(1, 2200))
    assert cache.nbytes() < 0.6 * dense.nbytes()


@pytest.mark.parametrize("more", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {}], ids=str)
def test_generate_drops(more):
    net = tiny.model()
    tokens, mask = tiny.padded(2, 40, [5, 0])
    cache = kvote.Cache(net, method(net))
    made = tiny.generate(net, tokens, cache, mask, **more)
    assert made.sequences.shape == (2 * more.get("num_return_sequences", 1), 48)
    assert cache.report().layers[0].dropped > 0
    for row in cache.positions(0):
        assert len(row[1]) == SINKS + WINDOW < len(row[0])


def test_a_further_turn_reads_what_was_kept():
    net = tiny.model()
    tokens = tiny.ids(1, 40)
    other = tokens.clone()
    other[:, 10:20] = tiny.ids(1, 10, seed=7)
    for sparsity in (1.0, 0.0):
        got = []
        for each in (tokens, other):
            # One layer: deeper ones pass on what they have seen.
            net = tiny.model(num_hidden_layers=1)
            cache = kvote.Cache(net, method(net, [[0.3, 0.4]], sparsity=sparsity))
            tiny.feed(net, cache, each)
            got.append(tiny.feed(net, cache, tiny.ids(1, 5, seed=3)))
        # All heads stream: what was between sinks and window makes no difference any more.
        assert torch.equal(*got) is (sparsity == 1.0)


def test_a_reader_is_for_the_heads_that_keep_everything():
    net = tiny.model()
    cache = kvote.Cache(net, method(net) | parse("tokenselect(top_k=5, sinks=2, window=6, chunk=1, theta=2.0)"))
    tiny.feed(net, cache, tiny.ids(1, 60))
    tiny.feed(net, cache, tiny.ids(1, 4, seed=2), passes=1)
    layers = {g.layer.method.keep.offers.drops: g.layer for g in cache.layers[0].layer.head_groups}
    assert layers[False].activity.selections > 0
    assert layers[False].activity.tokens_read == 14
    assert (layers[True].activity.selections, layers[True].activity.tokens_read) == (0, SINKS + WINDOW + 1)
    assert layers[True].activity.dropped > 0


@pytest.mark.parametrize(
    ("sparsity", "full"), [(0.0, 8), (0.25, 6), (0.5, 4), (0.6, 3), (0.75, 2), (0.99, 1), (1.0, 0)]
)
@pytest.mark.parametrize("gates", ["ties", "ones", "spread"])
def test_as_many_heads_stream_as_asked_even_if_gates_tie(sparsity, full, gates):
    net = tiny.model(num_hidden_layers=4)
    values = {
        "ties": [[1.0, 0.0]] * 4,
        "ones": [[1.0, 1.0]] * 4,
        "spread": [[0.1, 0.5], [0.9, 0.2], [0.3, 0.8], [0.7, 0]],
    }
    keep = method(net, values[gates], sparsity=sparsity).keep
    assert len(keep.whole) == full
    # The same every time.
    assert keep == method(net, values[gates], sparsity=sparsity).keep
    ranked = sorted(
        ((values[gates][layer][head], layer, head) for layer in range(4) for head in range(2)), reverse=True
    )
    least = min((values[gates][layer][head] for layer, head in keep.whole), default=1.0)
    assert all((layer, head) in keep.whole for gate, layer, head in ranked if gate > least)


def test_published_defaults():
    net = tiny.model()
    keep = duoattention(heads=scored.duo(net, GATES)).keep
    assert (keep.few.sinks, keep.few.budget.amount - keep.few.sinks) == (64, 256)
    assert keep.whole == {(0, 0), (1, 1)}


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ("", r"duoattention needs to know this model's heads: run `kvote calibrate .*--what duo.*heads='FILE'"),
        ("heads=3", "heads must be the name of a file; got 3"),
        ("heads='{file}', sparsity=2", "sparsity must be a share from 0 to 1"),
        ("heads='{file}', sinks=-1", "needs whole numbers sinks >= 0 and window >= 1"),
        ("heads='{file}', window=0", "needs whole numbers"),
        ("heads='{file}', window=2.5", "needs whole numbers"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(parameters, sentence):
    file = scored.file(scored.duo(tiny.model(), GATES))
    with pytest.raises(MethodError, match=sentence):
        parse(f"duoattention({parameters.format(file=file)})")


def test_heads_of_the_other_kind_are_refused():
    file = scored.file(scored.razor(tiny.model(), GATES))
    with pytest.raises(kvote.InputError, match="holds 'razor', not 'duo'; make that with `kvote calibrate"):
        parse(f"duoattention(heads='{file}')")
