"""A document is read once and asked many times."""

import copy
from contextlib import suppress
from typing import Any

import pytest
import tiny
import torch
from transformers import GenerationConfig

from kvote import (
    Cache,
    Document,
    InputError,
    KvoteError,
    NotFiniteError,
    OutOfMemoryError,
    UnsupportedModelError,
    methods,
)
from kvote.layer import Layer
from tests.test_interruptions import hybrid

METHODS = {
    "dense": "dense",
    "streamingllm": "streamingllm(sinks=2, window=20)",
    "tokenselect": "tokenselect(top_k=8, sinks=2, window=8, chunk=8, tail=4)",
    "random": "random(top_k=8, sinks=2, window=8, chunk=8, tail=4)",
}
TEXT = " ".join(f"w{i % 47}" for i in range(150))


class Encoded:
    def __init__(self, ids: list[int]) -> None:
        self.input_ids = torch.tensor([ids], dtype=torch.long).reshape(1, -1)


class Words:
    """A word-level tokenizer: ``w7`` is token 10."""

    eos_token_id = None

    def __call__(self, text: str, **kwargs: Any) -> Encoded:
        return Encoded([3 + int(word[1:]) for word in text.split()])

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return " ".join(f"w{i - 3}" for i in ids)


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def document(request: pytest.FixtureRequest) -> Document:
    return Document(tiny.model(), Words(), TEXT, request.param, tokens_per_pass=64)


def state(document: Document) -> Any:
    held = [[lane.tolist() for row in document.cache.positions(i) for lane in row] for i in range(2)]
    parts = [layer.segment.decode([0], 0, layer.segment.length(0)) for layer in document.cache.managed]
    return held, document.cache.get_seq_length(), [part.clone() for pair in parts for part in pair]


def test_questions_leave_the_document_as_it_was(document):
    held, length, parts = state(document)
    for question in ("w1 w2 w3", "w40", "w9 w9 w9 w9 w9 w9"):
        assert len(document.ask(question, max_new_tokens=5).token_ids) == 5
        now = state(document)
        assert now[:2] == (held, length) == (held, len(document))
        assert all(torch.equal(a, b) for a, b in zip(now[2], parts, strict=True))


def test_the_same_question_gets_the_same_answer_whatever_was_asked_between(document):
    first = document.ask("w1 w2 w3", max_new_tokens=6)
    document.ask("w30 w31", max_new_tokens=9)
    again = document.ask("w1 w2 w3", max_new_tokens=6)
    assert (first.text, first.token_ids) == (again.text, again.token_ids)
    assert document.ask("w30", max_new_tokens=6).token_ids != first.token_ids


def test_an_answer_equals_that_of_a_fresh_document(document):
    document.ask("w30 w31", max_new_tokens=9)
    fresh = Document(document.model, Words(), TEXT, document.cache.method, tokens_per_pass=64)
    assert document.ask("w5 w6").token_ids == fresh.ask("w5 w6").token_ids


def test_a_dense_answer_is_that_of_plain_generate():
    question = "w1 w2 w3"
    ids = Words()(f"{TEXT} {question}").input_ids
    expected = tiny.generate(tiny.model(), ids, max_new_tokens=6).sequences[0, ids.shape[1] :].tolist()
    answer = Document(tiny.model(), Words(), TEXT, tokens_per_pass=7).ask(question, max_new_tokens=6)
    assert answer.token_ids == expected
    assert answer.text == Words().decode(expected)


def test_times_are_told(document):
    answer = document.ask("w1", max_new_tokens=4)
    assert answer.first_token_seconds > 0
    assert answer.ms_per_token > 0
    assert document.ask("w1", max_new_tokens=1).ms_per_token is None
    assert document.prefill_seconds > 0


def test_progress_counts_every_token_once():
    told: list[int] = []
    document = Document(tiny.model(), Words(), TEXT, tokens_per_pass=64, progress=told.append)
    assert told == [64, 64, 22]
    assert len(document) == 150


def test_passes_do_not_change_a_document_whose_chunks_divide_them():
    spec = METHODS["tokenselect"]
    one = Document(tiny.model(), Words(), TEXT, spec)
    many = Document(one.model, Words(), TEXT, spec, tokens_per_pass=32)
    assert one.ask("w1 w2 w3").token_ids == many.ask("w1 w2 w3").token_ids


def test_only_the_question_selects_token_by_token():
    document = Document(tiny.model(), Words(), TEXT, METHODS["tokenselect"])
    before = document.cache.report().layers[0].selections
    # 150 tokens in chunks of 8; those up to 16 + 2 + 8 + 8 are read whole.
    assert before == 19 - 3
    tiny.feed(document.model, document.cache, tiny.ids(1, 6))
    # The last 4 one by one, the 2 before them together.
    assert document.cache.report().layers[0].selections == before + 5


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_an_empty_document_is_refused(text):
    with pytest.raises(InputError, match="document is empty"):
        Document(tiny.model(), Words(), text)


@pytest.mark.parametrize("question", ["", "  "])
def test_an_empty_question_is_refused(question, document):
    with pytest.raises(InputError, match="question is empty"):
        document.ask(question)


def interrupting(net: Any, layer: int, calls: int = 1) -> Any:
    """A hook that interrupts a layer at its n-th call."""
    seen = []

    def stop(*_: Any) -> None:
        seen.append(1)
        if len(seen) == calls:
            raise KeyboardInterrupt

    return net.model.layers[layer].register_forward_pre_hook(stop)


EVERY = {
    **METHODS,
    "h2o": "h2o(budget=40)",
    "snapkv": "snapkv(budget=40, window=6)",
    "cake": "cake(budget=40, window=6)",
    "mikv": "mikv(budget=40)",
    "kivi": "kivi(residual=32)",
    "think": "think(ratio=0.5, window=6, recent=5)",
    "xkv": "xkv(group=2, key_rank=6, value_rank=6)",
    "minicache": "minicache(start=0.0)",
    "tidaldecode": "tidaldecode(top_k=5, first=0)",
}


@pytest.mark.parametrize("spec", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("calls", [1, 3], ids=["question", "answer"])
def test_an_interrupted_question_leaves_the_document_as_it_was(spec, calls):
    document = Document(tiny.model(), Words(), TEXT, spec, tokens_per_pass=64)
    expected = document.ask("w1 w2 w3", max_new_tokens=6).token_ids
    held = state(document)[:2]
    for layer in (0, 1):
        handle = interrupting(document.model, layer, calls)
        with pytest.raises(KeyboardInterrupt):
            document.ask("w40 w41 w42 w43", max_new_tokens=6)
        handle.remove()
        assert [part.seen for part in document.cache.managed] == [len(document)] * 2
        assert state(document)[:2] == held
        assert document.ask("w1 w2 w3", max_new_tokens=6).token_ids == expected


def test_what_cannot_be_rolled_back_is_read_again(document, monkeypatch):
    expected = document.ask("w1 w2 w3", max_new_tokens=6).token_ids
    document.cache.passes.corrupt = True
    assert document.ask("w1 w2 w3", max_new_tokens=6).token_ids == expected
    document.cache.reset()
    assert document.ask("w1 w2 w3", max_new_tokens=6).token_ids == expected
    monkeypatch.setattr(Layer, "crop", lambda *_: interrupt())
    with suppress(KeyboardInterrupt):
        document.ask("w1 w2 w3", max_new_tokens=6)
    monkeypatch.undo()
    assert document.ask("w1 w2 w3", max_new_tokens=6).token_ids == expected
    assert document.cache.get_seq_length() == len(document)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_interrupted_reading_gives_no_document():
    net = tiny.model()
    handle = interrupting(net, 1, 2)
    with pytest.raises(KeyboardInterrupt):
        Document(net, Words(), TEXT, tokens_per_pass=64)
    handle.remove()
    assert len(Document(net, Words(), TEXT, tokens_per_pass=64).ask("w1", max_new_tokens=3).token_ids) == 3


def test_a_document_of_a_hybrid_model_can_be_asked_again():
    net = tiny.model("gemma3")
    document = Document(net, Words(), TEXT, tokens_per_pass=64)
    document._read = None  # It need not be read again.
    first = document.ask("w1 w2 w3", max_new_tokens=6).token_ids
    ids = Words()(f"{TEXT} w1 w2 w3").input_ids
    assert first == tiny.generate(net, ids, max_new_tokens=6).sequences[0, ids.shape[1] :].tolist()
    handle = interrupting(net, 1)
    with pytest.raises(KeyboardInterrupt):
        document.ask("w40 w41", max_new_tokens=6)
    handle.remove()
    assert document.ask("w1 w2 w3", max_new_tokens=6).token_ids == first


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 5.0, "top_k": 3},
        {"num_beams": 4, "num_return_sequences": 4},
        {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 200)), "bad_words_ids": [[9]], "forced_eos_token_id": 2},
        {"min_new_tokens": 9, "max_length": 5, "max_time": 0.0001, "prompt_lookup_num_tokens": 5},
        {"guidance_scale": 3.0, "cache_implementation": "static", "use_cache": False},
        {"output_attentions": True, "return_dict_in_generate": True, "output_scores": True},
    ],
    ids=str,
)
def test_an_answer_is_greedy_whatever_the_generation_config_says(settings, monkeypatch):
    document = Document(tiny.model(), Words(), TEXT)
    expected = document.ask("w1 w2 w3", max_new_tokens=6).token_ids
    monkeypatch.setattr(document.model, "generation_config", GenerationConfig(pad_token_id=0, **settings))
    before = document.model.generation_config.to_dict()
    assert document.ask("w1 w2 w3", max_new_tokens=6).token_ids == expected
    assert document.model.generation_config.to_dict() == before


def test_an_answer_ends_where_the_generation_config_says(monkeypatch):
    document = Document(tiny.model(), Words(), TEXT)
    ids = document.ask("w1 w2 w3", max_new_tokens=8).token_ids
    monkeypatch.setattr(document.model, "generation_config", GenerationConfig(pad_token_id=0, eos_token_id=ids[3]))
    assert document.ask("w1 w2 w3", max_new_tokens=8).token_ids == ids[: ids.index(ids[3]) + 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_layer_that_gives_no_numbers_is_named(value, layer, monkeypatch):
    net = copy.deepcopy(tiny.model())
    hooks = [list(module._forward_hooks) for module in net.modules()]
    document = Document(net, Words(), TEXT)
    expected = document.ask("w1 w2 w3", max_new_tokens=4).token_ids
    weight = net.model.layers[layer].mlp.down_proj.weight
    with torch.no_grad():
        kept, weight[0, 0] = weight[0, 0].clone(), value
    for broken in (lambda: document.ask("w1 w2 w3"), lambda: Document(net, Words(), TEXT)):
        with pytest.raises(NotFiniteError, match=f"NaN or infinite logits: layer {layer} is the first"):
            broken()
    with torch.no_grad():
        weight[0, 0] = kept
    assert document.ask("w1 w2 w3", max_new_tokens=4).token_ids == expected
    assert [list(module._forward_hooks) for module in net.modules()] == hooks


def test_numbers_that_break_in_the_middle_of_an_answer_are_found_too():
    net = copy.deepcopy(tiny.model())
    document = Document(net, Words(), TEXT)
    third = document.ask("w1 w2 w3", max_new_tokens=4).token_ids[2]
    with torch.no_grad():
        net.model.embed_tokens.weight[third] = float("inf")
    with pytest.raises(NotFiniteError, match="what goes into layer 0"):
        document.ask("w1 w2 w3", max_new_tokens=6)


def test_an_output_head_that_gives_no_numbers_is_named():
    net = copy.deepcopy(tiny.model())
    document = Document(net, Words(), TEXT)
    with torch.no_grad():
        net.lm_head.weight[7] = float("nan")
    with pytest.raises(NotFiniteError, match="its output head does"):
        document.ask("w1")


def test_tokens_that_a_model_rules_out_are_no_error():
    net = copy.deepcopy(tiny.model())
    document = Document(net, Words(), TEXT)
    net.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([7]), float("-inf")))
    assert len(document.ask("w1", max_new_tokens=3).token_ids) == 3


def long_rope() -> Any:
    factors = [1.0 + i for i in range(8)]
    rope = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": factors, "long_factor": factors[::-1],
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    return tiny.model("phi3", rope_parameters=rope, max_position_embeddings=256, original_max_position_embeddings=64)


@pytest.mark.parametrize(("words", "question", "count"), [(60, "w1 w2 w3 w4 w5 w6", 3), (60, "w1 w2", 8)])
def test_an_answer_from_another_cache_is_refused(words, question, count):
    """Phi-3 throws the cache away where a text passes the length it was first trained for."""
    net = long_rope()
    document = Document(net, Words(), " ".join(TEXT.split()[:words]))
    fine = document.ask("w1", max_new_tokens=2).token_ids
    says = "Phi3ForCausalLM .* more than 64 tokens, and would throw the cache away"
    with pytest.raises(UnsupportedModelError, match=says):
        document.ask(question, max_new_tokens=count)
    assert document.ask("w1", max_new_tokens=2).token_ids == fine


def test_a_text_beyond_the_short_factors_is_rotated_alike_from_its_beginning():
    net = long_rope()
    ids = Words()(f"{TEXT} w1 w2 w3").input_ids
    expected = tiny.generate(net, ids, max_new_tokens=6).sequences[0, ids.shape[1] :].tolist()
    for per_pass in (16, 64, 65, 149, 150, 4096):
        assert (
            Document(net, Words(), TEXT, tokens_per_pass=per_pass).ask("w1 w2 w3", max_new_tokens=6).token_ids
            == expected
        )


def test_a_copy_that_finds_no_memory_is_said_so(monkeypatch):
    document = Document(tiny.model(), Words(), TEXT, "streamingllm(sinks=2, window=20)")
    expected = document.ask("w1 w2 w3").token_ids
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):

        def fails(*_: Any, error: Exception = error) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Cache, "__deepcopy__", fails)
            with pytest.raises(OutOfMemoryError, match=r"no memory for a copy of the [\d,]+ bytes that streamingllm"):
                document.ask("w1 w2 w3")
    assert document.ask("w1 w2 w3").token_ids == expected


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (lambda d: d.ask("w1", max_new_tokens=0), "max_new_tokens must be a whole number of at least 1"),
        (lambda d: d.ask("w1", max_new_tokens=2.5), "max_new_tokens must be"),
        (lambda d: d.ask(None), "A question is a text; got a NoneType"),
        (lambda d: Document(d.model, Words(), None), "document is empty"),
        (lambda d: Document(d.model, Words(), TEXT, tokens_per_pass=0), "tokens_per_pass must be"),
        (lambda d: Document(d.model, Words(), TEXT, tokens_per_pass=-4), "tokens_per_pass must be"),
        (lambda d: Document(None, Words(), TEXT), "A cache is made for a loaded model"),
        (lambda d: Cache("gpt2"), r"from_pretrained\('gpt2'\); got 'gpt2'"),
        (lambda d: Cache(None), "made for a loaded model, .* got None"),
        (lambda d: Cache(d.model, None), "method is a spec .* got None"),
        (lambda d: Cache(d.model, methods.h2o), r"call it: h2o\(\); got a function"),
        (lambda d: Cache(d.model, 7), "method is a spec .* got 7"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_a_sentence(refused, says):
    with pytest.raises(KvoteError, match=says):
        refused(Document(tiny.model(), Words(), "w1 w2"))


def test_a_document_is_not_asked_in_the_middle_of_an_answer():
    document = Document(tiny.model(), Words(), TEXT)
    expected = document.ask("w1", max_new_tokens=3).token_ids
    handle = document.model.lm_head.register_forward_hook(lambda *_: document.ask("w2") and None)
    with pytest.raises(InputError, match="in the middle of an answer"):
        document.ask("w1", max_new_tokens=3)
    handle.remove()
    assert document.ask("w1", max_new_tokens=3).token_ids == expected


def test_a_document_of_a_model_with_states_can_be_asked_again():
    net = hybrid()
    document = Document(net, Words(), TEXT, tokens_per_pass=64)
    ids = Words()(f"{TEXT} w1 w2 w3").input_ids
    expected = tiny.generate(net, ids, max_new_tokens=6).sequences[0, ids.shape[1] :].tolist()
    for layer in range(4):
        assert document.ask("w1 w2 w3", max_new_tokens=6).token_ids == expected
        handle = interrupting(net, layer, 2)
        with pytest.raises(KeyboardInterrupt):
            document.ask("w40 w41", max_new_tokens=6)
        handle.remove()
    assert document.ask("w1 w2 w3", max_new_tokens=6).token_ids == expected


def test_a_question_that_comes_first_is_known_to_the_method():
    """SnapKV keeps what the end of a prompt looks at: with the question in it, that of plain generate()."""
    net, spec = tiny.model(), "snapkv(budget=40, window=6)"
    document = Document(net, Words(), TEXT, spec)
    later = document.ask("w1 w2 w3 w4 w5 w6", max_new_tokens=8).token_ids
    ids = Words()(f"{TEXT} w1 w2 w3 w4 w5 w6").input_ids
    expected = tiny.generate(net, ids, Cache(net, spec), max_new_tokens=8).sequences[0, ids.shape[1] :].tolist()
    assert document.ask("w1 w2 w3 w4 w5 w6", max_new_tokens=8, question_first=True).token_ids == expected != later
    assert document.ask("w1 w2 w3 w4 w5 w6", max_new_tokens=8).token_ids == later


def test_questions_do_not_see_what_others_made_a_method_encode():
    document = Document(tiny.model(), Words(), TEXT, "kivi(residual=32)")
    question = " ".join(f"w{i}" for i in range(20))
    first, again = (document.ask(question, max_new_tokens=20).token_ids for _ in range(2))
    assert first == again


def test_queries_decide_what_stays_and_are_forgotten():
    net, spec, asked = tiny.model(), "snapkv(budget=40, window=6, kernel=1)", "w1 w2 w3 w4 w5 w6"
    document = Document(net, Words(), TEXT, spec, queries=asked, tokens_per_pass=64)
    whole = Cache(net, spec)
    tiny.feed(net, whole, Words()(f"{TEXT} {asked}").input_ids)
    unasked = Document(net, Words(), TEXT, spec)
    assert len(document) == document.cache.get_seq_length() == 150
    for layer in range(2):
        lanes = zip(*(c.positions(layer)[0] for c in (document.cache, whole, unasked.cache)), strict=True)
        for kept, with_question, without in lanes:
            kept, with_question, without = (set(lane.tolist()) for lane in (kept, with_question, without))
            assert len(kept) == 40
            assert max(kept) == 149
            # The last 6 stay in any case, of the document as of the prompt with the question.
            assert {place for place in with_question if place < 144} <= kept
            assert kept != without
    first = document.ask(asked, max_new_tokens=6).token_ids
    assert document.ask("w9", max_new_tokens=6).token_ids != first == document.ask(asked, max_new_tokens=6).token_ids


@pytest.mark.parametrize("spec", EVERY.values(), ids=EVERY)
def test_every_method_takes_queries_back(spec):
    document = Document(tiny.model(), Words(), TEXT, spec, queries="w1 w2 w3 w4 w5 w6 w7 w8 w9", tokens_per_pass=64)
    most = [int(lane.max()) for i in range(2) for lane in document.cache.positions(i)[0]]
    assert most == [149] * 4
    assert document.cache.get_seq_length() == len(document)
    answers = [document.ask("w1 w2 w3", max_new_tokens=6).token_ids for _ in range(2)]
    assert answers[0] == answers[1]
    if not document.cache.method.keep.offers.drops:
        assert answers[0] == Document(tiny.model(), Words(), TEXT, spec).ask("w1 w2 w3", max_new_tokens=6).token_ids
