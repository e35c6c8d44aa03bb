"""``kvote read``, ``kvote info``, and ``kvote ask`` with files that they keep."""

import json
from pathlib import Path
from typing import Any

import pytest

import kvote
from kvote.cli import main

QUESTION = "what is the age of bob?"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    text = tmp_path / "book.txt"
    text.write_text("the age of bob is seven . " * 40)
    return text


def run(capsys: Any, *argv: Any) -> Any:
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_was_read_once_is_asked_later(capsys, book, tmp_path, monkeypatch):
    kept = tmp_path / "book.kv"
    read = run(capsys, "read", book, "-o", kept, "--method", "dense")
    fresh = run(capsys, "ask", "--document", book, "--question", QUESTION, "--method", "dense")
    found = run(capsys, "info", kept)
    assert found["tokens"] == read["tokens"] == fresh["tokens"]
    assert (found["kind"], found["method"], found["whole"]) == ("document", "dense", True)
    assert found["file_bytes"] == read["file_bytes"] == kept.stat().st_size
    monkeypatch.setattr(kvote.Document, "_read", None)
    asked = run(capsys, "ask", "--load", kept, "--question", QUESTION)
    assert asked["tokens"] == fresh["tokens"]
    assert asked["answer"] == fresh["answer"]
    assert asked["runs"][0]["kv_bytes"] > 0


def test_an_asked_document_is_kept(capsys, book, tmp_path):
    kept = tmp_path / "book.kv"
    fresh = run(capsys, "ask", "--document", book, "--question", QUESTION, "--save", kept)
    assert run(capsys, "ask", "--load", kept, "--question", QUESTION)["answer"] == fresh["answer"]
    assert main(["info", str(kept)]) == 0
    out = capsys.readouterr().out
    assert f"a document of {fresh['tokens']:,} tokens" in out
    assert "tokenselect(" in out


def test_a_damaged_file_is_one_sentence_or_read_again(capsys, book, tmp_path):
    kept = tmp_path / "book.kv"
    run(capsys, "read", book, "-o", kept)
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 4
    kept.write_bytes(data)
    for argv in (["info", kept], ["ask", "--load", kept, "--question", QUESTION]):
        assert main(list(map(str, argv))) == 2
        said = capsys.readouterr().err.strip().split("\n")[-1]
        assert "have changed. Read the text again" in said
    assert main(["ask", "--load", str(kept), "--document", str(book), "--question", QUESTION]) == 0
    assert "The text is read again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["ask", "--load", "gone.kv"], "it needs --question"),
        (["ask", "--load", "gone.kv", "--question", "who?"], "Cannot read gone.kv"),
        (["ask", "--load", "gone.kv", "--question", "who?", "--compare"], "leave --compare out"),
        (["ask", "--tokens", "600", "--save", "nowhere/x.kv"], "there is no folder nowhere"),
        (["read", "gone.txt", "-o", "x.kv"], "Cannot read gone.txt"),
        (["info", "gone.kv"], "Cannot read gone.kv"),
        (["info", "."], "Cannot read .: Is a directory"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(capsys, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_file_of_another_method_is_named(capsys, book, tmp_path):
    kept = tmp_path / "book.kv"
    run(capsys, "read", book, "-o", kept, "--method", "dense")
    assert main(["ask", "--load", str(kept), "--question", QUESTION, "--method", "streamingllm"]) == 2
    assert "was made with 'dense', not with 'streamingllm" in capsys.readouterr().err
