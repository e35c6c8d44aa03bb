import io
import shutil
import sys
from pathlib import Path

import pytest
import torch

from kvote.cli import main
from kvote.models import embedded


def refused(capsys, *argv: str) -> str:
    """The sentence with which the command refuses; it is all that is said."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kvote: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    return err.removeprefix("kvote: ").strip()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "the following arguments are required: COMMAND; see kvote --help."),
        (["sing"], "COMMAND: invalid choice: 'sing'"),
        (["ask", "--nonsense"], "unrecognized arguments: --nonsense"),
        (
            ["ask", "--tokens", "many"],
            "--tokens: must be a whole number of at least 1, got 'many'; see kvote ask --help.",
        ),
        (["ask", "--tokens", "0"], "--tokens: must be a whole number of at least 1, got '0'"),
        (["ask", "--max-new-tokens", "-3"], "--max-new-tokens: must be a whole number of at least 1"),
        (["ask", "--tokens", "20"], "--tokens 20 is too small for what the question asks: 4 facts need a document"),
        (["ask", "--method", "xyz"], "There is no method 'xyz'; there are actqkv, adakv, cake,"),
        (["ask", "--method", "tokenselect(top=5)"], "tokenselect has no parameter 'top'; it has top_k,"),
        (["ask", "--method", "tokenselect(top_k=0)"], "top_k must be a whole number of at least 1; got 0."),
        (["ask", "--method", "tokenselect("], "'tokenselect(' is not a method; write for example"),
        (["ask", "--method", ""], "'' is not a method; write for example"),
        (["ask", "--method", "streamingllm | random"], "streamingllm and random both decide what to read"),
        (["ask", "--compare", "xyz"], "There is no method 'xyz'"),
        (["ask", "--compare", "dense", "--compare", "xyz"], "There is no method 'xyz'"),
        (["ask", "--question", " "], "The question is empty; ask something."),
        (["ask", "--document", "-"], "A document needs a question; add --question."),
        (["ask", "--document", "-", "--question", "Why?", "--tokens", "99"], "--tokens sets the size of the built-in"),
        (["ask", "--document", "gone.txt", "--question", "Why?"], "Cannot read gone.txt: No such file or directory."),
        (["ask", "--document", ".", "--question", "Why?"], "Cannot read .: Is a directory."),
        (["ask", "--model", "./gone"], "There is no model folder ./gone."),
        (["train-embedded"], "the following arguments are required: --out-dir"),
        (["train-embedded", "--out-dir", "x", "--seed", "-1"], "--seed: must be a whole number of at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(capsys, monkeypatch, tmp_path, argv, sentence):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, *argv).startswith(sentence)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty; give a text to read."),
        (b" \n\t", "is empty; give a text to read."),
        (b"\xef\xbb\xbf", "is empty; give a text to read."),
        (b"PK\x03\x04\x00\x00", "is not UTF-8 text; convert it to plain text first."),
        (b"caf\xe9", "is not UTF-8 text; convert it to plain text first."),
    ],
)
@pytest.mark.parametrize("piped", [False, True])
def test_documents_without_text(capsys, monkeypatch, tmp_path, data, sentence, piped):
    path = tmp_path / "document.txt"
    path.write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    name = "standard input" if piped else str(path)
    assert (
        refused(capsys, "ask", "--document", "-" if piped else str(path), "--question", "Why?") == f"{name} {sentence}"
    )


def test_an_unreadable_file(capsys, monkeypatch, tmp_path):
    def deny(path, flags):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("kvote.files.os.open", deny)
    assert refused(capsys, "ask", "--document", "a", "--question", "b") == "Cannot read a: Permission denied."


def test_an_unknown_hub_name(capsys, monkeypatch):
    def unknown(*args, **kwargs):
        raise OSError("nobody/nothing is not a local folder and is not listed.\nMore lines\nof advice")

    monkeypatch.setattr("kvote.cli.load.AutoConfig.from_pretrained", unknown)
    said = refused(capsys, "ask", "--model", "nobody/nothing", "--tokens", "100")
    assert said == "Cannot load a model from 'nobody/nothing': nobody/nothing is not a local folder and is not listed."


def test_a_folder_that_is_no_model(capsys, tmp_path):
    assert refused(capsys, "ask", "--model", str(tmp_path), "--tokens", "100").startswith("Cannot load a model from")


def test_pickled_weights_are_not_read(capsys, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(embedded()) / name, tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert "safetensors" in refused(capsys, "ask", "--model", str(tmp_path), "--tokens", "100")


def test_a_document_that_does_not_fit_into_memory(capsys, monkeypatch):
    monkeypatch.setattr("kvote.cli.room.memory", lambda: (2**30, 2**20))
    said = refused(capsys, "ask", "--tokens", "4000")
    assert "4,0" in said
    assert "tokens of document and answer need 0.0 GiB for keys and values with tokenselect(top_k=512" in said


def test_memory_that_runs_out_on_the_way(capsys, monkeypatch):
    def exhausted(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("kvote.cli.reading.Document", exhausted)
    assert main(["ask", "--tokens", "100"]) == 2
    assert "kvote: Memory ran out with tokenselect; give a shorter document.\n" in capsys.readouterr().err


def test_a_checkpoint_of_another_recipe(capsys, monkeypatch):
    def another(**kwargs):
        raise ValueError("x is a checkpoint of another recipe")

    monkeypatch.setattr("kvote.models.train.train", another)
    assert (
        refused(capsys, "train-embedded", "--out-dir", "x")
        == "Cannot train into x: x is a checkpoint of another recipe."
    )


def test_interruption(capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvote.cli.ask.load", interrupt)
    assert main(["ask", "--tokens", "100"]) == 130
    assert capsys.readouterr() == ("", "kvote: interrupted.\n")
