"""Uses at the edge of what the parts were made for: each of these once went wrong."""

import copy
import gc
import weakref

import pytest
import tiny
import torch
from transformers import DynamicCache

import kvote
from kvote import kernels
from kvote.errors import InputError
from kvote.hf.facts import find_rope
from kvote.kernels import cpu, law, masks, reference

SELECTING = "tokenselect(top_k=6, sinks=2, window=4, chunk=8, tail=4, theta=2.0)"
compiled = pytest.mark.skipif(cpu.why_not() is not None, reason="not compiled")


@pytest.mark.parametrize("heads", [17, 32])
def test_many_query_heads_may_share_one_key_head(heads):
    net = tiny.model(hidden_size=16 * heads, num_attention_heads=heads, num_key_value_heads=1, head_dim=16)
    expected = tiny.generate(net, tiny.ids(1, 30)).sequences
    assert torch.equal(tiny.generate(net, tiny.ids(1, 30), tiny.cache(net, "dense")).sequences, expected)
    assert torch.equal(tiny.generate(net, tiny.ids(1, 30), tiny.cache(net, "tokenselect")).sequences, expected)


@compiled
def test_votes_that_are_not_numbers_lose_and_every_index_is_one():
    votes = torch.full((2, 5000), float("nan"))
    votes[1, 7] = 1.0
    index = kernels.top_k(votes, 200)
    assert ((index >= 0) & (index < 5000)).all()
    assert (index.diff(dim=-1) > 0).all()
    assert 7 in index[1]


@compiled
@pytest.mark.parametrize("isa", ["avx512_bf16", "avx512", "avx2", "scalar"])
def test_a_broken_query_or_key_is_not_answered_with_confidence(isa):
    used = cpu.instruction_set()
    if not cpu.use(isa):
        pytest.skip(f"{isa} is not on this machine")
    try:
        net = tiny.model()
        cache = tiny.cache(net, "dense")
        tiny.feed(net, cache, tiny.ids(1, 20))
        cache.managed[0].segment.pool.keys[0, 3] = float("nan")
        assert tiny.feed(net, cache, tiny.ids(1, 1)).isnan().any()
    finally:
        cpu.use(used)


def test_scores_of_half_precision_keys_do_not_overflow():
    big = torch.full((1, 1, 3, 64), 40.0, dtype=torch.float16)
    assert reference.scores(big[:, :, :1], big).max() == 40.0 * 40.0 * 64


def test_beams_and_announcements_work_inside_inference_mode():
    net = tiny.model()
    expected = tiny.generate(net, tiny.ids(1, 40), num_beams=3).sequences
    cache = tiny.cache(net, "tokenselect")
    with torch.inference_mode():
        got = net.generate(tiny.ids(1, 40), past_key_values=cache, num_beams=3, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, expected)
    with torch.inference_mode():
        cache.batch_select_indices(torch.tensor([0]))
        cache.expect(500)
    tiny.feed(net, cache, tiny.ids(1, 30))


def test_tokens_that_a_later_mask_calls_padding_are_forgotten():
    net = tiny.model()
    tokens, mask = tiny.ids(2, 30), torch.ones(2, 40, dtype=torch.long)
    own, other = tiny.cache(net, "dense"), DynamicCache(config=net.config)
    for cache in (own, other):
        tiny.feed(net, cache, tokens, mask[:, :30])
    mask[0, 24:30] = 0
    got, expected = (tiny.feed(net, cache, tiny.ids(2, 10, seed=1), mask) for cache in (own, other))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert [len(lanes[0]) for lanes in own.positions(0)] == [34, 40]


def test_a_mask_that_brings_padding_back_is_refused():
    net = tiny.model()
    tokens, mask = tiny.padded(2, 30, [5, 0])
    cache = tiny.cache(net, "dense")
    tiny.feed(net, cache, tokens, mask)
    with pytest.raises(InputError, match="mask changed"):
        tiny.feed(net, cache, tiny.ids(2, 4), torch.ones(2, 34, dtype=torch.long))


def test_after_a_rollback_another_prompt_has_a_tail_again():
    net = tiny.model()
    whole, cut = tiny.cache(net, SELECTING), tiny.cache(net, SELECTING)
    text, question = tiny.ids(1, 48), tiny.ids(1, 10, seed=1)
    tiny.feed(net, whole, text)
    cut.expect(58)
    tiny.feed(net, cut, text)
    cut.crop(-8)
    cut.crop(0)
    before = cut.report().layers[0].selections
    tiny.feed(net, cut, question)
    assert cut.report().layers[0].selections - before >= 4


def test_rejected_drafts_do_not_change_what_came_before_them():
    net = tiny.model()
    tokens = tiny.ids(1, 90)
    cache = tiny.cache(net, SELECTING)
    tiny.feed(net, cache, tokens[:, :60])
    cache.activate_past_recording()
    other = copy.deepcopy(cache)
    drafts, changed = tokens[:, 60:71], torch.cat([tokens[:, 60:65], tokens[:, 80:86]], dim=1)
    got, expected = tiny.feed(net, cache, drafts), tiny.feed(net, other, changed)
    torch.testing.assert_close(got[:, :5], expected[:, :5], atol=1e-4, rtol=1e-4)
    assert cache.report().layers[0].selections == other.report().layers[0].selections


def test_the_reference_never_holds_all_logits_at_once(monkeypatch):
    monkeypatch.setattr(law.attention, "LOGITS_HELD", 1000)
    sizes = []
    attend = reference.attend

    def watched(query, key, *args, **kwargs):
        sizes.append(query.shape[1] * query.shape[2] * key.shape[2])
        return attend(query, key, *args, **kwargs)

    monkeypatch.setattr(reference, "attend", watched)
    query, key = torch.randn(1, 4, 50, 16), torch.randn(1, 2, 60, 16)
    out, lse = kernels.attend(query, key, key, scale=0.25, softcap=5.0)
    assert len(sizes) > 10
    assert max(sizes) <= 1000
    mask = masks.end_aligned(50, 60, None, query.device)
    expected = attend(query, key, key, scale=0.25, softcap=5.0, mask=mask)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


def test_tables_of_dynamic_ropes_do_not_depend_on_what_was_read_before():
    kind = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    net = tiny.model("llama", rope_parameters=kind, max_position_embeddings=64)
    rope = find_rope(net, 0)
    before = copy.deepcopy(rope).contiguous(200, net.device)[0].clone()
    rope.angles(torch.arange(5000)[None], torch.float32)
    assert torch.equal(rope.contiguous(200, net.device)[0], before)


@pytest.mark.parametrize("name", ["refrence", "cuda"])
def test_a_backend_that_does_not_exist_is_refused(monkeypatch, name):
    monkeypatch.setenv("KVOTE_BACKEND", name)
    with pytest.raises(InputError, match="KVOTE_BACKEND must be"):
        kernels.backend()


def test_rolling_back_more_than_was_read_forgets_everything():
    net = tiny.model()
    cache = tiny.cache(net, "dense")
    tiny.feed(net, cache, tiny.ids(1, 10))
    cache.crop(-20)
    assert cache.get_seq_length() == 0


def test_an_interrupted_question_leaves_the_document_as_it_was(monkeypatch):
    from test_document import TEXT, Words

    document = kvote.Document(tiny.model(), Words(), TEXT, "dense")
    generate = document.model.generate

    def interrupted(*args, **kwargs):
        generate(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(document.model, "generate", interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        document.ask(TEXT[:20])
    assert document.cache.get_seq_length() == len(document)


@pytest.mark.parametrize("method", ["dense", "cake(budget=20, window=6)", "tokenselect"])
def test_a_cache_that_nobody_holds_is_gone_at_once(method):
    """Not at the next garbage collection: it may hold most of the memory."""
    net = tiny.model()
    cache = kvote.Cache(net, method)
    tiny.feed(net, cache, tiny.ids(1, 30))
    pages = [weakref.ref(layer.segment.pool.keys) for layer in cache.managed]
    gc.collect()
    gc.disable()
    try:
        del cache
        assert [page() for page in pages] == [None, None]
    finally:
        gc.enable()
