"""What a terminal gets to see of documents, models, paths and errors, and numbers that mean nothing."""

import json
import sys

import pytest

from kvote.cli import main
from kvote.cli.outcome import Outcome, Run
from kvote.cli.plain import one_line, plain
from kvote.cli.show import Page, plain_console, plain_table

EVIL = "a\x1b[31mb\x07c\rd\x9be\u202ef\x00g\x7fh\ud800i\u2028j"
OBEYED = set(EVIL) - set("abcdefghij[31m")
WRITTEN = r"a\x1b[31mb\x07c\rd\x9be\u202ef\x00g\x7fh\ud800i\u2028j"


def test_control_characters_are_written_out_and_text_stays():
    assert plain(EVIL) == WRITTEN
    text = "naïve Ελληνικά 漢字 عربي 👩‍💻\n\tfar"
    assert plain(text) == text
    assert one_line("one\n two\t three") == "one two three"


def outcome(text: str) -> Outcome:
    run = Run(text, "dense", text, False, 1000.5, 100.25, 12345.5, 1_048_576, 2**36)
    return Outcome(text, "float32", 1024, text, 1_048_576, text, text, [run, run])


def show(outcome: Outcome, *, json: bool) -> None:
    Page([outcome], json=json, quiet=False).show()


def test_nothing_in_an_outcome_is_obeyed(capsys):
    show(outcome(EVIL), json=False)
    out = capsys.readouterr().out
    assert not OBEYED & set(out)
    # A narrow column folds it.
    assert out.count(r"a\x1b[31mb\x07c") >= 4
    show(outcome(EVIL), json=True)
    out = capsys.readouterr().out
    assert out.isascii()
    assert not OBEYED & set(out)
    assert json.loads(out)["answer"] == EVIL


@pytest.mark.parametrize("name", ["dense", "snapkv(budget=100, window=16, kernel=3, pooling='max') | kivi(bits=4)"])
def test_the_table_of_an_outcome_fits_80_columns(capsys, name):
    show(outcome(name), json=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[4:])) <= 80
    assert "68,719,476,736" not in lines
    assert any("65,536.0" in line for line in lines)


def test_further_lines_of_an_answer_pass_for_nothing_else(capsys):
    show(outcome("one\nModel     another"), json=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("Model")] == ["Model     one Model another"]
    assert "Answer    one" in lines
    assert any(line.startswith("          Model     another") for line in lines)


def test_nothing_in_an_answer_that_comes_in_pieces_is_obeyed(capsys):
    made = outcome(EVIL)
    page = Page([made], json=False, quiet=False)
    write = page.stream(made)
    for piece in (EVIL, "\nModel     another"):
        write(piece)
    page.show()
    out = capsys.readouterr().out
    assert not OBEYED & set(out)
    assert f"Answer    {WRITTEN}\n          Model     another (wrong: it is {WRITTEN})\n" in out


def test_tables_and_lines_of_every_command_are_plain(capsys):
    console, table = plain_console(), plain_table()
    table.add_column(":smile:")
    table.add_row(EVIL)
    console.print(EVIL)
    console.print(table)
    out = capsys.readouterr().out
    assert out.count(WRITTEN) == 2
    assert ":smile:" in out


@pytest.mark.parametrize(
    "argv",
    [
        ["ask", EVIL],
        ["ask", "--document", EVIL, "--question", "Why?"],
        ["ask", "--model", f"./{EVIL}", "--tokens", "60"],
        ["ask", "--method", EVIL],
        ["ask", "--tokens", EVIL],
        ["methods", EVIL],
        ["calibrate", "--what", "channels", "--out", f"{EVIL}/x"],
        ["train-embedded", "--out-dir", EVIL],
        [EVIL],
    ],
    ids=lambda argv: argv[0][:9],
)
def test_errors_repeat_arguments_in_plain_text(capsys, argv):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kvote: ")
    assert err.count("\n") == 1
    assert not (OBEYED - {"\n"}) & set(err)


def test_escapes_of_a_document_and_a_question(capsys, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The \x1b[31mgrass\x07 is \x9b31m green. \u202e ")
    argv = ["ask", "--document", str(path), "--question", "\x1b]0;title\x07 Why\r?", "--max-new-tokens", "2"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert not OBEYED & set(out + err)
    assert r"\x1b]0;title\x07 Why ?" in out


@pytest.mark.parametrize("number", ["-1", "1e3", "nan", "inf", "0x10", "", "9" * 5000, str(10**30), str(10**15 + 1)])
@pytest.mark.parametrize("option", ["--tokens", "--max-new-tokens"])
def test_numbers_that_mean_nothing(capsys, option, number):
    assert main(["ask", f"{option}={number}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"kvote: {option}: must be a whole number ")
    assert len(err) < 200


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--tokens", str(10**15)], "A document of 1,000,000,000,000,000 tokens takes 93,132,257.4 GiB to make, and "),
        (
            ["--tokens", "60", "--max-new-tokens", str(10**12)],
            "1,000,000,000,0",
        ),
    ],
)
def test_more_than_the_memory_holds_is_refused_before_anything_is_read(capsys, monkeypatch, argv, sentence):
    for module in ("subject", "room"):
        monkeypatch.setattr(f"kvote.cli.{module}.memory", lambda: (2**34, 2**33))
    monkeypatch.setattr("kvote.cli.reading.Document", None)
    assert main(["ask", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"kvote: {sentence}")
    assert "8.0 GiB are free" in err


def test_standard_input_without_an_end_is_read_up_to_the_memory_that_is_free(capsys, monkeypatch):
    monkeypatch.setattr("kvote.cli.subject.memory", lambda: (2**30, 2**21))
    with open("/dev/zero") as endless:
        monkeypatch.setattr(sys, "stdin", endless)
        assert main(["ask", "--document", "-", "--question", "Why?"]) == 2
    assert capsys.readouterr().err == (
        "kvote: Standard input holds more than 2,097,152 bytes, which is all the memory that is free.\n"
    )


@pytest.mark.parametrize("question", ["a\0b", "\ud800"])
def test_questions_that_are_no_text(capsys, question):
    assert main(["ask", "--tokens", "300", "--question", question]) == 2
    assert capsys.readouterr().err == "kvote: The question is not UTF-8 text; ask it in plain text.\n"
