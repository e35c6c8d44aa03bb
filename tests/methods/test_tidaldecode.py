"""TidalDecode: the proofs of its card (arXiv 2410.05076)."""

from functools import partial
from typing import Any

import masking
import pytest
import tiny
import torch
from masking import decoded, top
from torch import Tensor

from kvote import MethodError, kernels
from kvote.keep.evict import sinks_and_recent
from kvote.method import Method
from kvote.read.persistent import PersistentPositions
from kvote.spec import parse
from kvote.store.uncompressed import UncompressedSegment
from kvote.tokens import TokenSet

PROMPT, STEPS, K = 60, 6, 9
run = partial(masking.run, prompt=PROMPT, steps=STEPS)
model = partial(masking.model, layers=6)


def published(first: int, reselect: int) -> Any:
    """The published rule: the mask of a selecting layer holds until the next one."""
    held: dict[str, Tensor] = {}

    def mask(layer: int, logits: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
        if layer in (first, reselect):
            held["mask"] = top(logits, K)
        return None if layer <= first or layer == reselect else held["mask"]

    return mask


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("first", "reselect"), [(2, 4), (0, 3), (1, 2), (0, 5), (2, 0)])
def test_logits_are_those_of_the_published_mask(groups, first, reselect):
    net = model(groups=groups)
    expected = decoded(net, tiny.ids(2, PROMPT + STEPS), PROMPT, published(first, reselect or 99))
    _, got = run(net, f"tidaldecode(top_k={K}, first={first}, reselect={reselect})")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    # The mask matters: whoever reads everything answers something else.
    assert not torch.allclose(run(net, "dense")[1], expected, atol=1e-2, rtol=1e-2)


def test_a_budget_that_covers_everything_is_dense_attention_bit_by_bit():
    net = model()
    assert torch.equal(run(net, f"tidaldecode(top_k={PROMPT + STEPS})")[1], run(net, "dense")[1])


def test_layers_up_to_the_first_selecting_one_are_dense_bit_by_bit():
    net = model()
    states = []
    for method in ("dense", f"tidaldecode(top_k={K})"):
        cache, tokens = tiny.cache(net, method), tiny.ids(2, PROMPT + 1)
        tiny.feed(net, cache, tokens[:, :PROMPT])
        with torch.no_grad():
            out = net(input_ids=tokens[:, PROMPT:], past_key_values=cache, output_hidden_states=True)
        states.append(out.hidden_states)
    dense, tidal = states
    # Entry i goes into layer i: what layer 2 answers is entry 3.
    assert all(torch.equal(dense[i], tidal[i]) for i in range(4))
    assert not torch.allclose(dense[4], tidal[4], atol=1e-3)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[UncompressedSegment, Tensor, TokenSet]]:
    """What segments are asked for: the segment, the rotated queries and the tokens."""
    seen: list[tuple[UncompressedSegment, Tensor, TokenSet]] = []
    attend = UncompressedSegment.attend

    def spy(self: Any, queries: Any, rows: Any, tokens: Any, scaling: Any) -> Any:
        seen.append((self, queries.rotated, tokens))
        return attend(self, queries, rows, tokens, scaling)

    monkeypatch.setattr(UncompressedSegment, "attend", spy)
    return seen


def test_positions_persist_from_a_selecting_layer_to_the_next(reads):
    net = model(layers=8)
    cache = tiny.cache(net, f"tidaldecode(top_k={K}, first=1, reselect=4)")
    tokens = tiny.ids(2, PROMPT + STEPS)
    tiny.feed(net, cache, tokens[:, :PROMPT])
    for at in range(PROMPT, PROMPT + STEPS):
        reads.clear()
        tiny.feed(net, cache, tokens[:, at : at + 1])
        assert [read.index for _, _, read in reads if not read.by_head] == [range(at + 1)] * 3
        chosen = {}
        for layer in (1, 4):
            segment, query, _ = reads[layer]
            key = segment.decode([0, 1], 0, at + 1)[0].repeat_interleave(2, dim=1)
            chosen[layer] = (query @ key.transpose(-1, -2)).topk(K).indices.sort().values
        assert not torch.equal(chosen[1], chosen[4])
        for layer in range(2, 8):
            if layer != 4:
                assert torch.equal(reads[layer][2].index, chosen[1 if layer < 4 else 4])


@pytest.mark.parametrize("layers", [6, 9])
@pytest.mark.parametrize(("reselect", "selections"), [(4, 2), (0, 1)])
def test_tokens_are_chosen_once_or_twice_per_step_however_deep_the_model(monkeypatch, layers, reselect, selections):
    net, calls, top_k = model(layers=layers), [], kernels.top_k
    monkeypatch.setattr(kernels, "top_k", lambda votes, k: (calls.append(k), top_k(votes, k))[1])
    run(net, f"tidaldecode(top_k={K}, reselect={reselect})", rows=1)
    assert calls == [K] * selections * STEPS


def test_the_report_says_what_was_chosen_and_what_was_reused():
    cache, _ = run(model(), f"tidaldecode(top_k={K}, reselect=4)")
    layers = cache.report().layers
    assert [layer.selections for layer in layers] == [0, 0, 2 * STEPS, 0, 2 * STEPS, 0]
    assert [layer.reused for layer in layers] == [0, 0, 0, 2 * STEPS, 0, 2 * STEPS]
    assert [layer.tokens_read for layer in layers] == [66, 66, 66, K, 66, K]
    assert all(layer.tokens_held == 2 * 66 for layer in layers)


@pytest.mark.parametrize(
    ("layers", "selecting"),
    [(4, (2,)), (5, (2,)), (6, (2, 4)), (12, (2, 4)), (16, (2, 6)), (28, (2, 11)), (32, (2, 13)), (80, (2, 32))],
)
def test_the_second_choosing_layer_is_as_deep_as_published(layers, selecting):
    assert parse("tidaldecode").read.selecting(layers) == selecting


def test_prompts_turns_and_announced_tokens_are_read_whole():
    net = model()
    cache = tiny.cache(net, f"tidaldecode(top_k={K})")
    cache.expect(50)
    tokens = tiny.ids(1, 75)
    passes = tiny.feed(net, cache, tokens[:, :50], passes=1)
    whole = tiny.feed(net, tiny.cache(net), tokens[:, :50])
    torch.testing.assert_close(passes, whole, atol=1e-4, rtol=1e-4)
    tiny.feed(net, cache, tokens[:, 50:70])
    assert all(layer.selections == layer.reused == 0 for layer in cache.report().layers)
    assert all(layer.tokens_read == 70 for layer in cache.report().layers)
    tiny.feed(net, cache, tokens[:, 70:75], passes=1)
    assert cache.report().layers[3].reused == 5


def test_drafts_are_read_whole():
    net, tokens = model(), tiny.ids(1, PROMPT + 4)
    cache, dense = tiny.cache(net, f"tidaldecode(top_k={K})"), tiny.cache(net)
    for each in (cache, dense):
        tiny.feed(net, each, tokens[:, :PROMPT])
    cache.activate_past_recording()
    drafts = tiny.feed(net, cache, tokens[:, PROMPT:])
    torch.testing.assert_close(drafts, tiny.feed(net, dense, tokens[:, PROMPT:]), atol=1e-4, rtol=1e-4)
    assert all(layer.selections == layer.reused == 0 for layer in cache.report().layers)
    out = tiny.generate(
        net, tokens[:, :40].repeat(1, 2), tiny.cache(net, "tidaldecode(top_k=9)"), prompt_lookup_num_tokens=3
    )
    assert out.sequences.shape[1] == 88


def test_nothing_is_carried_over_to_a_shorter_text():
    """After a rollback to fewer tokens than are read, everything is read."""
    net = model()
    cache, tokens = tiny.cache(net, f"tidaldecode(top_k={K})"), tiny.ids(1, PROMPT)
    tiny.feed(net, cache, tokens[:, :50])
    tiny.feed(net, cache, tokens[:, 50:], passes=1)
    cache.crop(-(PROMPT - 5))
    short = tiny.feed(net, cache, tokens[:, 5:7], passes=1)
    dense = tiny.cache(net)
    tiny.feed(net, dense, tokens[:, :5])
    torch.testing.assert_close(short, tiny.feed(net, dense, tokens[:, 5:7], passes=1), atol=1e-4, rtol=1e-4)


def test_generated_tokens_fed_again_in_one_pass_correct_the_cache():
    net, tokens, later = model(), tiny.ids(2, PROMPT + STEPS), tiny.ids(2, 2, seed=1)
    dense, _ = run(net, "dense")
    expected = tiny.feed(net, dense, later)
    drifted, _ = run(net, f"tidaldecode(top_k={K}, reselect=4)")
    corrected, _ = run(net, f"tidaldecode(top_k={K}, reselect=4)")
    corrected.crop(-STEPS)
    tiny.feed(net, corrected, tokens[:, PROMPT:])
    assert not torch.allclose(tiny.feed(net, drifted, later), expected, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(tiny.feed(net, corrected, later), expected, atol=1e-4, rtol=1e-4)


def test_of_a_hybrid_model_only_full_attention_counts_and_shares():
    kinds = ["sliding_attention", "full_attention"] * 4
    net = tiny.model("gemma3", num_hidden_layers=8, layer_types=kinds)
    cache, _ = run(net, f"tidaldecode(top_k={K}, first=0, reselect=2)")
    layers = cache.report().layers
    assert [layer.layer for layer in layers] == [1, 3, 5, 7]
    assert [layer.selections for layer in layers] == [2 * STEPS, 0, 2 * STEPS, 0]
    assert [layer.reused for layer in layers] == [0, 2 * STEPS, 0, 2 * STEPS]


def test_it_reads_what_a_window_keeps_in_all_layers():
    """Tokens that go in every layer alike stay in the same slots everywhere."""
    net = model()
    method = Method("both", keep=sinks_and_recent(4, 36), read=PersistentPositions(K, 2, 4))
    cache, _ = run(net, lambda _: method)
    layers = cache.report().layers
    assert all(layer.dropped > 0 for layer in layers)
    assert layers[5].reused == 2 * STEPS
    positions = [cache.positions(layer) for layer in range(6)]
    assert all(torch.equal(lane, positions[0][0][0]) for rows in positions for row in rows for lane in row)


@pytest.mark.parametrize("keep", ["h2o(budget=20)", "h2o(budget=20, per_head=False)", "snapkv(budget=40, window=6)"])
def test_layers_that_keep_other_tokens_cannot_share_positions(keep):
    with pytest.raises(MethodError, match="another layer has picked, but layers do not keep the same tokens"):
        parse(f"{keep} | tidaldecode")


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("tidaldecode(top_k=0)", "top_k must be a whole number of at least 1; got 0"),
        ("tidaldecode(first=-1)", "first must be a whole number of at least 0; got -1"),
        ("tidaldecode(reselect='deep')", "reselect must be a whole number of at least 0; got 'deep'"),
        ("tidaldecode(reselect=True)", "reselect must be a whole number of at least 0; got True"),
        ("tidaldecode(first=4, reselect=4)", r"a layer after the first selecting one \(4\), or 0 for none; got 4"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(spec, sentence):
    with pytest.raises(MethodError, match=sentence):
        parse(spec)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("tidaldecode", "There are 3 layers with full attention, so none would read what layer 2 chooses"),
        ("tidaldecode(first=0, reselect=3)", "so there is no layer 3 to choose anew; give a smaller one"),
    ],
)
def test_models_with_too_few_layers_are_refused(spec, sentence):
    net = model(layers=3)
    with pytest.raises(MethodError, match=sentence):
        tiny.feed(net, tiny.cache(net, spec), tiny.ids(1, 5))
