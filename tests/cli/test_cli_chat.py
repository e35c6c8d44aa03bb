"""``kvote chat``, and what ``kvote ask`` shares with it: streaming, options of generation, quiet answers."""

import io
import json
import shutil
import sys
from pathlib import Path

import gguf
import pytest
import torch

from kvote.cli import main
from kvote.models import embedded, world

SAMPLE = world.sample("needle", 400, 3)
PROMPT, ANSWER = SAMPLE.questions[0].prompt, SAMPLE.questions[0].answer


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(SAMPLE.document)
    return str(path)


@pytest.fixture
def says(monkeypatch):
    def typed(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return typed


def refused(capsys, *argv: str) -> str:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err.removeprefix("kvote: ").strip()


def test_every_line_is_answered(capsys, document, says):
    says(f"{PROMPT}\n\n{PROMPT}\n/bye\n{PROMPT}\n")
    assert main(["chat", "--document", document, "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == ANSWER
    assert len(lines) == 2
    assert err == ""


def test_a_chat_without_a_document_and_its_report(capsys, says):
    says(f"/report\n{PROMPT}\n/report\n")
    assert (
        main(["chat", "--method", "h2o(budget=64)", "--max-new-tokens", "3", "--temperature", "0.5", "--seed", "1"])
        == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("Nothing has been said yet.\n")
    assert "tokens_held" in out


@pytest.mark.parametrize("more", [[], ["--stream"], ["--question-first"], ["--queries", PROMPT], ["--num-beams", "2"]])
def test_a_quiet_answer_is_the_answer_alone(capsys, document, more):
    argv = ["ask", "--document", document, "--question", PROMPT, "--max-new-tokens", "5", "-q", *more]
    assert main(argv) == 0
    assert capsys.readouterr() == (f"{ANSWER}\n", "")


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_several_questions_about_one_document(capsys, document, stream):
    other = "What is the pass key?"
    argv = ["ask", "--document", document, "--question", PROMPT, "--question", other, "--max-new-tokens", "5"]
    assert main([*argv, stream, "--compare", "dense"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line.split()[0] for line in lines[:6]] == ["Model", "Document", "Question", "Answer", "Question", "Answer"]
    assert lines[3] == f"Answer    {ANSWER}"
    rows = [line.split()[0] for line in lines if line.split()[:1] in (["1"], ["2"])]
    assert rows == ["1", "1", "2", "2"]
    assert main([*argv, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)["questions"]
    assert [each["question"] for each in made] == [PROMPT, other]
    assert made[0]["answer"] == ANSWER


def test_the_seed_decides_what_is_drawn(capsys, document):
    def drawn(seed: str) -> str:
        argv = ["ask", "--document", document, "--question", PROMPT, "--temperature", "30", "--seed", seed, "-q"]
        assert main([*argv, "--max-new-tokens", "9"]) == 0
        return capsys.readouterr().out

    assert drawn("1") == drawn("1") != drawn("2")


def test_a_dtype_of_ones_own(capsys, document):
    argv = ["ask", "--document", document, "--question", PROMPT, "--max-new-tokens", "5", "--dtype", "bfloat16"]
    assert main([*argv, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["dtype"], made["answer"]) == ("bfloat16", ANSWER)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--system", "Be brief."], "A system message has no place: this tokenizer has no chat template"),
        (["--device", "nowhere"], "torch cannot use the device 'nowhere' here: "),
        (["--device", "meta"], "torch cannot use the device 'meta' here: it holds no numbers"),
        (["--top-p", "1.5"], "--top-p is a probability, at most 1; got 1.5."),
        (["--temperature", "hot"], "--temperature: must be a number of at least 0, got 'hot'"),
        (["--temperature", "nan"], "--temperature: must be a number of at least 0, got 'nan'"),
        (["--stop", ""], "--stop takes a text that ends the answer"),
        (["--question", ""], "The question is empty; ask something."),
        (["-q", "--json"], "--json: not allowed with argument -q/--quiet"),
        (["-q", "--compare"], "-q prints one answer alone; leave --compare out."),
        (["--json", "--stream"], "--json prints one object at the end; leave --stream out."),
        (["--num-beams", "2", "--stream"], "--num-beams finds an answer at its end; leave --stream out."),
        (["--queries", "a", "--question-first"], "--question-first reads the document with each question"),
        (["--queries", " "], "The question is empty"),
        (["--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
    ],
)
def test_what_makes_no_sense_is_refused(capsys, more, says):
    assert says in refused(capsys, "ask", "--tokens", "300", *more)


def test_what_a_chat_cannot_read_is_refused(capsys, tmp_path):
    assert "give the document as a file" in refused(capsys, "chat", "--document", "-")
    (tmp_path / "empty.txt").touch()
    assert "is empty; give a text to read" in refused(capsys, "chat", "--document", str(tmp_path / "empty.txt"))


def test_weights_are_rounded_where_that_can_be(capsys, monkeypatch, tmp_path):
    found = {"torchao": None}
    monkeypatch.setattr("kvote.cli.place.find_spec", found.get)
    says = refused(capsys, "ask", "--tokens", "300", "--load-in", "int8")
    assert says == "Weights are rounded to int8 by torchao; install it: pip install 'kvote[torchao]'."
    found["torchao"] = True
    assert "no kernels for int4 weights on the CPU" in refused(capsys, "ask", "--tokens", "300", "--load-in", "int4")
    path = written(tmp_path)
    assert "a format of its own; leave --load-in out" in refused(capsys, "ask", "--model", path, "--load-in", "int8")


def written(folder: Path) -> str:
    """A small GGUF file with random weights and a tokenizer of single letters."""
    path = str(folder / "tiny.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    letters = [*"abcdefghijklmnopqrstuvwxy", "ab", "Ġ", "<|end|>"]
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([1] * 27 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(27)
    writer.add_chat_template("{% for m in messages %}<|end|>{{ m['content'] }}{% endfor %}<|end|>")
    shapes = {
        "token_embd": (28, 32),
        "output": (28, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_a_model(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("abc def ghi " * 20)
    path = written(tmp_path)
    argv = ["ask", "--document", str(tmp_path / "text.txt"), "--question", "abc", "--max-new-tokens", "3", "--model"]
    assert main([*argv, path, "--json"]) == 0
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert (made["model"], made["trained_tokens"], err) == (path, 512, "")
    letter = made["answer"][0]
    assert main([*argv, path, "-q", "--stop", letter]) == 0
    assert capsys.readouterr().out.strip() in (letter, "ab")
    assert len(made["answer"]) > 2


def test_stop_strings_that_transformers_cannot_find_are_refused(capsys, document):
    says = refused(capsys, "ask", "--document", document, "--question", PROMPT, "--stop", "7")
    assert says == "transformers cannot look for stop_strings with this tokenizer; leave them out."


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is not a GGUF file, whatever its name says."),
        (b"<html>404</html>", "is not a GGUF file, whatever its name says."),
        (b"GGUF", "Cannot load a model from "),
        (None, "Cannot load a model from "),
    ],
)
def test_broken_gguf_files_are_refused(capsys, tmp_path, data, says):
    path = Path(written(tmp_path))
    path.write_bytes(path.read_bytes()[:5000] if data is None else data)
    assert says in refused(capsys, "ask", "--tokens", "100", "--model", str(path))


def test_gguf_without_its_package_is_refused(capsys, tmp_path, monkeypatch):
    path = written(tmp_path)
    monkeypatch.setattr("kvote.cli.source.find_spec", lambda name: None)
    assert "pip install 'kvote[gguf]'" in refused(capsys, "ask", "--tokens", "100", "--model", path)


def test_a_chat_template_of_a_model_is_used(capsys, tmp_path, document):
    folder = tmp_path / "model"
    shutil.copytree(embedded(), folder)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    argv = ["ask", "--model", str(folder), "--document", document, "--question", PROMPT, "--max-new-tokens", "5", "-q"]
    for more in ([], ["--raw"], ["--system", PROMPT]):
        assert main([*argv, *more]) == 0
        assert capsys.readouterr().out == f"{ANSWER}\n"
