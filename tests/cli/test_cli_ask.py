import io
import json
import shutil
import sys

import pytest

from kvote.cli import main
from kvote.models import embedded, world
from kvote.models.presets import preset


def asked(capsys, *argv: str):
    assert main(["ask", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_built_in_document_is_answered_beyond_the_trained_length(capsys):
    made = asked(capsys, "--tokens", "3000", "--max-new-tokens", "5")
    assert made["right"] is True
    assert made["answer"] == made["expected"]
    assert made["tokens"] == 3000
    assert made["trained_tokens"] == 1024
    assert [run["method"] for run in made["runs"]] == [preset("tokenselect")]
    assert 784 <= made["runs"][0]["tokens_read"] <= 784 + 40


def test_the_schema_of_the_json_object(capsys):
    made = asked(capsys, "--tokens", "900", "--compare", "--compare", "tokenselect(top_k=64)", "--max-new-tokens", "5")
    types = {
        "model": str,
        "dtype": str,
        "trained_tokens": int,
        "document": str,
        "tokens": int,
        "question": str,
        "expected": str,
        "answer": str,
        "right": bool,
        "runs": list,
    }
    assert {name: type(value) for name, value in made.items()} == types
    types = {
        "name": str,
        "method": str,
        "answer": str,
        "right": bool,
        "prefill_seconds": float,
        "first_token_seconds": float,
        "ms_per_token": float,
        "tokens_read": int,
        "kv_bytes": int,
    }
    for run in made["runs"]:
        assert {name: type(value) for name, value in run.items()} == types
    names = ["tokenselect", "dense", "streamingllm", "random", "tokenselect(top_k=64)"]
    assert [run["name"] for run in made["runs"]] == names
    assert made["answer"] == made["runs"][0]["answer"]
    dense = made["runs"][1]
    # Document, question and at least one token of the answer; 4 layers of 2 heads of 32 float32 channels, twice.
    assert 900 < dense["tokens_read"] < 940
    assert dense["kv_bytes"] >= 900 * 4 * 2 * 2 * 32 * 4
    assert made["runs"][2]["tokens_read"] <= 1024


def test_what_a_person_sees(capsys):
    assert main(["ask", "--tokens", "1100", "--compare", "dense", "--max-new-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    question = world.sample("needle", 1100, 0).questions[0]
    lines = [line.rstrip() for line in out.splitlines()]
    assert lines[0] == "Model     embedded"
    assert lines[1] == "Document  built-in, 1,100 tokens, 1.07 times the 1,024 that the model was made for"
    assert lines[2] == f"Question  {question.prompt}"
    assert lines[3].startswith(("Answer    " + question.answer + " (right)", "Answer    "))
    rows = [line.split() for line in lines[4:]]
    heads = " ".join(word for row in rows[:3] for word in row)
    assert all(word in heads for word in ("method", "answer", "prefill", "first", "ms per", "tokens", "KV held", "MiB"))
    assert [row[0] for row in rows if row and row[0] in ("tokenselect", "dense")] == ["tokenselect", "dense"]
    assert "kvote:" not in err


@pytest.mark.parametrize("piped", [False, True])
def test_a_document_of_ones_own(capsys, monkeypatch, tmp_path, piped):
    made = world.sample("needle", 600, 7)
    path = tmp_path / "text.txt"
    path.write_text(made.document)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(made.document.encode())))
    where = "-" if piped else str(path)
    said = asked(capsys, "--document", where, "--question", made.questions[0].prompt, "--max-new-tokens", "5")
    assert said["document"] == ("standard input" if piped else str(path))
    assert said["answer"] == made.questions[0].answer
    assert said["expected"] is None
    assert said["right"] is None
    assert said["tokens"] == 600


def test_words_that_the_embedded_model_does_not_know_are_mentioned(capsys, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Colourless green ideas sleep furiously.")
    assert main(["ask", "--document", str(path), "--question", "Why?", "--max-new-tokens", "1"]) == 0
    assert "kvote: the embedded model does not know" in capsys.readouterr().err


def test_another_question_about_the_built_in_document_is_not_judged(capsys):
    said = asked(capsys, "--tokens", "500", "--question", "What is the pass key?", "--max-new-tokens", "2")
    assert said["expected"] is None
    assert said["right"] is None


@pytest.mark.parametrize(
    ("trained", "method"), [(8192, "tokenselect"), (1024, "tokenselect(top_k=512, sinks=16, window=256, chunk=128)")]
)
def test_a_model_of_ones_own_gets_the_papers_defaults_if_they_fit(capsys, tmp_path, trained, method):
    folder = tmp_path / "model"
    shutil.copytree(embedded(), folder)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": trained}))
    said = asked(capsys, "--model", str(folder), "--tokens", "400", "--max-new-tokens", "3")
    assert said["model"] == str(folder)
    assert said["runs"][0]["method"] == method
