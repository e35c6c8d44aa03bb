"""A document is read once and asked many times."""

from typing import Any

import pytest
import tiny
import torch

from kvote import Document, InputError

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
