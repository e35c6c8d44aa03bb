"""A hit gives the tokens that a miss would have given, with every method of the contract."""

import threading
from typing import Any

import pytest
import scored
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import kvote
from kvote import Cache, InputError, Library, Method
from kvote.library.scope import Reading
from kvote.models import embedded, world
from tests.test_contract import METHODS

SHARED, OWN = 48, 22


@pytest.fixture
def net() -> PreTrainedModel:
    return tiny.model(hidden_size=128, head_dim=16, num_attention_heads=8, num_key_value_heads=2)


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def method(request: pytest.FixtureRequest, net: PreTrainedModel) -> Method:
    if callable(request.param):
        return request.param(net)
    return kvote.spec.parse(scored.written(net, request.param))


def loaded() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(embedded()), AutoTokenizer.from_pretrained(embedded())


def prompt(seed: int, own: int = OWN) -> Tensor:
    """Ids that begin as those of other seeds do."""
    return torch.cat([tiny.ids(1, SHARED), tiny.ids(1, own, seed)], dim=1)


def answer(net: Any, cache: Cache) -> tuple[Tensor, list[list[list[int]]]]:
    """Logits of a question and of tokens behind it, and the positions that are held then."""
    logits = [tiny.feed(net, cache, tiny.ids(1, 7, 30)), tiny.feed(net, cache, tiny.ids(1, 3, 31), passes=1)]
    lanes = [[lane.tolist() for lane in cache.positions(layer.index)[0]] for layer in cache.managed]
    return torch.cat(logits, dim=1), lanes


@pytest.mark.parametrize("question_follows", [True, False], ids=["document", "prompt"])
def test_a_hit_gives_what_a_miss_would_have_given(net, method, question_follows):
    reading = {"question_follows": question_follows, "tokens_per_pass": 32}
    library = Library()
    for ids in (prompt(1), prompt(2), prompt(2), tiny.ids(1, SHARED - 5)):
        miss, none = Library().cache(net, method, ids, **reading)
        hit, _ = library.cache(net, method, ids, **reading)
        assert none == 0
        assert hit.get_seq_length() == miss.get_seq_length() == ids.shape[1]
        (got, held), (wanted, same) = answer(net, hit), answer(net, miss)
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        assert got.argmax(-1).tolist() == wanted.argmax(-1).tolist()
        assert held == same
    known = library.statistics
    assert (known.prompts, known.hits > 0, known.tokens_reused >= 70) == (4, True, True)


def test_what_is_lent_ends_before_the_tokens_that_chose_what_they_read(net):
    first, second = tiny.ids(1, 40), prompt(3)
    spec, library = "oracle(top_k=4, tail=8)", Library()
    read, _ = Library().cache(net, spec, first, question_follows=False)
    library.keep("scope", read, first, 1.0)
    _, reused, _ = library.lend("scope", Cache(net, spec), second, Reading(32, question_follows=False))
    assert reused == 32


@pytest.mark.parametrize(
    ("spec", "reused"),
    [
        ("dense", SHARED),
        ("tokenselect(top_k=5, sinks=2, window=16, chunk=16, tail=0)", SHARED),
        ("tokenselect(top_k=5, sinks=2, window=20, chunk=20, tail=0)", 40),
        ("tokenselect(top_k=5, sinks=2, window=6, chunk=1, tail=0, sketch='int8')", 0),
        ("quest(token_budget=12, page=4, dense_layers=0)", SHARED),
        ("tidaldecode(top_k=5, first=0)", SHARED),
        ("random(top_k=5, sinks=2, window=6, chunk=1)", 0),
        ("snapkv(budget=20, window=6)", 0),
        ("kivi(residual=32)", 0),
        ("xkv(group=2, key_rank=6, value_rank=6)", 0),
        ("streamingllm(sinks=2, window=9)", 0),
    ],
)
def test_how_much_of_a_prefix_is_reused_is_a_fact_of_the_method(net, spec, reused):
    library = Library()
    assert library.cache(net, spec, prompt(1), tokens_per_pass=32)[1] == 0
    assert library.cache(net, spec, prompt(2), tokens_per_pass=32)[1] == reused
    assert library.cache(net, spec, prompt(1), tokens_per_pass=32)[1] == SHARED + OWN


@pytest.mark.parametrize(("question_follows", "reused"), [(True, 48), (False, 40)])
def test_the_tail_of_a_prompt_is_read_anew(net, question_follows, reused):
    spec, library = "tokenselect(top_k=5, sinks=2, window=6, chunk=4, tail=30)", Library()
    for expected, seed in ((0, 1), (reused, 2)):
        assert library.cache(net, spec, prompt(seed), question_follows=question_follows)[1] == expected


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss"])
def test_a_window_that_has_moved_on_is_not_moved_back(family):
    net, library = tiny.model(family), Library()
    for ids in (prompt(1), prompt(2)):
        hit, reused = library.cache(net, "dense", ids)
        assert reused == 0
        got, wanted = answer(net, hit)[0], answer(net, Library().cache(net, "dense", ids)[0])[0]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    assert library.cache(net, "dense", prompt(2))[1] == SHARED + OWN


def test_a_rotation_that_follows_from_the_length_is_reused_whole_only():
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    net, library = tiny.model(rope_parameters=rope, max_position_embeddings=60), Library()
    assert [library.cache(net, "dense", prompt(seed))[1] for seed in (1, 2, 2)] == [0, 0, SHARED + OWN]


def test_another_model_method_or_way_to_read_shares_nothing(net):
    library = Library()
    library.cache(net, "dense", prompt(1))
    others = [
        (tiny.model(seed=3), "dense", {}),
        (net, "kivi(residual=32)", {}),
        (net, "dense", {"question_follows": False}),
        (net, "dense", {"tokens_per_pass": 16}),
    ]
    assert [library.cache(model, method, prompt(1), **more)[1] for model, method, more in others] == [0] * 4


def test_a_model_that_was_trained_meanwhile_shares_nothing(net):
    library, weight = Library(), net.model.layers[0].self_attn.k_proj.weight
    library.cache(net, "dense", prompt(1))
    before = weight.data[0, 0].clone()
    try:
        # Behind the back of torch's count of changes.
        weight.data[0, 0] += 1
        assert library.cache(net, "dense", prompt(1))[1] == 0
    finally:
        weight.data[0, 0] = before
    assert library.cache(net, "dense", prompt(1))[1] == SHARED + OWN


def test_pages_are_shared_and_counted_once():
    net, library = tiny.model(), Library()
    text = torch.cat([tiny.ids(1, 250, seed) for seed in range(8)], dim=1)
    caches = [library.cache(net, "dense", torch.cat([text, tiny.ids(1, 20, 90 + i)], dim=1))[0] for i in range(4)]
    apart = sum(cache.nbytes() for cache in caches)
    assert library.statistics.held == 4
    assert library.statistics.nbytes < apart / 2
    assert library.statistics.tokens_reused == 3 * 2000


def test_what_goes_on_from_a_prefix_does_not_change_it(net):
    library, wanted = Library(), answer(net, Library().cache(net, "dense", prompt(1))[0])[0]
    for _ in range(3):
        assert torch.equal(answer(net, library.cache(net, "dense", prompt(1))[0])[0], wanted)


def test_a_longer_prompt_takes_the_place_of_a_shorter_one(net):
    library = Library()
    for count in (20, 40, 60):
        library.cache(net, "dense", prompt(1)[:, :count])
    assert library.statistics.held == 1
    assert library.cache(net, "dense", prompt(1)[:, :20])[1] == 20


def test_what_is_worth_least_goes_first(net):
    now, one = [0.0], Library().cache(net, "dense", prompt(1))[0].nbytes()
    library = Library(memory=int(2.5 * one), clock=lambda: now[0])
    texts = [tiny.ids(1, 70, seed) for seed in range(3)]
    for ids in texts[:2]:
        now[0] += 1
        library.cache(net, "dense", ids)
    now[0] += 1_000_000
    # Read again and again, it stays.
    assert library.cache(net, "dense", texts[0])[1] == 70
    now[0] += 1
    library.cache(net, "dense", texts[2])
    known = library.statistics
    assert (known.held, known.dropped, known.nbytes <= 2.5 * one) == (2, 1, True)
    assert [library.cache(net, "dense", ids)[1] > 60 for ids in (texts[0], texts[1])] == [True, False]


def test_threads_share_a_library(net):
    library, failed = Library(), []
    wanted = {seed: answer(net, Library().cache(net, "dense", prompt(seed))[0])[0] for seed in range(1, 4)}

    def ask(seed: int) -> None:
        try:
            for _ in range(4):
                got = answer(net, library.cache(net, "dense", prompt(seed))[0])[0]
                torch.testing.assert_close(got, wanted[seed], atol=1e-4, rtol=1e-4)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert library.statistics.hits >= 9


def test_documents_are_read_once():
    sample = world.sample("needle", tokens=1024, seed=0)
    model, tokenizer = loaded()
    for method in ("dense", "kvzip(budget=0.5)", "kivi"):
        library, seen = Library(), []
        first, second = (
            kvote.Document(model, tokenizer, sample.document, method, library=library, progress=seen.append)
            for _ in range(2)
        )
        alone = kvote.Document(model, tokenizer, sample.document, method)
        assert first.cache.equals(alone.cache)
        assert second.cache.equals(alone.cache)
        assert library.statistics.tokens_reused == len(first)
        assert sum(seen) == 2 * len(first)
        question = sample.questions[0].prompt
        wanted = alone.ask(question, max_new_tokens=6).token_ids
        assert [each.ask(question, max_new_tokens=6).token_ids for each in (first, second, first)] == [wanted] * 3
        third = kvote.Document(model, tokenizer, sample.document, method, library=library)
        assert third.cache.equals(kvote.Document(model, tokenizer, sample.document, method).cache)


@pytest.mark.parametrize("ids", [tiny.ids(2, 5), tiny.ids(1, 5)[0], tiny.ids(1, 5).float(), tiny.ids(1, 5)[:, :0]])
def test_ids_of_anything_but_one_prompt_are_refused(net, ids):
    with pytest.raises(InputError, match="A library takes"):
        Library().cache(net, "dense", ids)


@pytest.mark.parametrize("size", ["much", -1, 1.5, None])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(InputError, match="memory is a size in bytes"):
        Library(memory=size)
