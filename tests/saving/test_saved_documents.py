"""A document that was read once is loaded, or read again, and never answers wrongly."""

import os
from pathlib import Path

import pytest
import tiny

from kvote import Cache, Document, InputError
from kvote.saving.block_file import DamagedFileError
from tests.test_document import METHODS, TEXT, Words

QUESTION = "w3 w9 w44"


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def document(request: pytest.FixtureRequest) -> Document:
    return Document(tiny.model(), Words(), TEXT, request.param, tokens_per_pass=64)


def test_a_loaded_document_answers_as_the_saved_one(document, tmp_path):
    document.ask("w1 w2", max_new_tokens=3)
    document.save(tmp_path / "book.kv")
    loaded = Document.load(tmp_path / "book.kv", document.model, Words())
    assert vars(loaded).keys() == vars(document).keys()
    assert len(loaded) == len(document)
    for question in (QUESTION, "w7"):
        assert loaded.ask(question).token_ids == document.ask(question).token_ids
    # And what it gives can be saved again.
    loaded.save(tmp_path / "again.kv")
    assert Document.load(tmp_path / "again.kv", document.model, Words()).ask(QUESTION) is not None


@pytest.fixture
def book(tmp_path: Path) -> Path:
    Document(tiny.model(), Words(), TEXT).save(tmp_path / "book.kv")
    return tmp_path / "book.kv"


class OtherWords(Words):
    pass


def test_another_tokenizer_is_refused_by_name(book):
    with pytest.raises(InputError, match="was made with another tokenizer"):
        Document.load(book, tiny.model(), OtherWords())


def test_a_cache_is_no_document(book, tmp_path):
    with pytest.raises(InputError, match=r"holds a document, not a cache"):
        Cache.load(book, tiny.model())


@pytest.mark.parametrize("fault", ["flipped", "cut", "gone", "another text", "another model"])
def test_with_the_text_at_hand_it_is_read_again(book, fault):
    text, net = TEXT, tiny.model()
    if fault == "flipped":
        data = bytearray(book.read_bytes())
        data[len(data) // 2] ^= 1
        book.write_bytes(data)
    elif fault == "cut":
        os.truncate(book, 1000)
    elif fault == "gone":
        book.unlink()
    elif fault == "another text":
        text = TEXT + " w5"
    else:
        net = tiny.model(seed=1)
    fresh = Document(net, Words(), text)
    with pytest.warns(UserWarning, match="The text is read again"):
        loaded = Document.load(book, net, Words(), text=text, method="dense")
    assert loaded.ask(QUESTION).token_ids == fresh.ask(QUESTION).token_ids


def test_how_it_is_read_again_follows_from_a_whole_header(book):
    data = bytearray(book.read_bytes())
    data[-40] ^= 1
    book.write_bytes(data)
    with pytest.warns(UserWarning, match="bytes of its block"):
        assert Document.load(book, tiny.model(), Words(), text=TEXT).cache.method.spec == "dense"
    data[10] ^= 1
    book.write_bytes(data)
    with pytest.raises(InputError, match="give method= as well"):
        Document.load(book, tiny.model(), Words(), text=TEXT)


def test_a_document_of_other_tokens_is_refused(book, monkeypatch):
    document = Document(tiny.model(), Words(), TEXT)
    document.token_ids = document.token_ids.clone()
    document.token_ids[0, 3] = 10**6
    document.save(book)
    with pytest.raises(DamagedFileError, match="tokens that the model does not know"):
        Document.load(book, tiny.model(), Words())
