"""Answers appear as they come, and end when nobody reads on."""

import pytest
import tiny
from talking import TEXT, Words

from kvote import Document, InputError, NotFiniteError


@pytest.mark.parametrize("spec", ["dense", "h2o(budget=40)"])
def test_pieces_together_are_the_answer(spec):
    document = Document(tiny.model(), Words(), TEXT, spec)
    expected = document.ask("w1 w2 w3", max_new_tokens=9)
    stream = document.stream("w1 w2 w3", max_new_tokens=9)
    pieces = list(stream)
    assert len(pieces) > 5
    assert "".join(pieces) == expected.text == stream.answer.text
    assert stream.answer.token_ids == expected.token_ids
    assert list(stream) == []


@pytest.mark.parametrize("spec", ["dense", "h2o(budget=40)"])
def test_a_stream_that_is_closed_early_leaves_the_document_as_it_was(spec):
    document = Document(tiny.model(), Words(), TEXT, spec)
    expected = document.ask("w1 w2 w3", max_new_tokens=6).token_ids
    with document.stream("w9 w8", max_new_tokens=5000) as stream:
        next(stream)
    assert len(stream.answer.token_ids) < 5000
    assert document.cache.get_seq_length() == len(document)
    assert document.ask("w1 w2 w3", max_new_tokens=6).token_ids == expected


def test_what_goes_wrong_is_raised_by_the_iterator():
    document = Document(tiny.model(), Words(), TEXT)

    def breaks(*_):
        raise NotFiniteError("not now")

    handle = document.model.register_forward_pre_hook(breaks)
    stream = document.stream("w1")
    for _ in range(2):
        with pytest.raises(NotFiniteError, match="not now"):
            next(stream)
    handle.remove()
    with pytest.raises(InputError, match="has not come yet"):
        stream.answer  # noqa: B018
    with pytest.raises(InputError, match="question is empty"):
        document.stream(" ")
