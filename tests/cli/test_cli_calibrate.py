import json
import os

import pytest

from kvote.calibration import load
from kvote.calibration.channels import order_of
from kvote.calibration.heads import scores_of
from kvote.cli import calibrate as calibrate_command
from kvote.cli import main
from kvote.spec import parse


def calibrate(capsys, tmp_path, *more: str) -> tuple[dict, str]:
    out = tmp_path / "channels.json"
    assert main(["calibrate", "--what", "channels", "--out", str(out), "--json", *more]) == 0
    told, err = capsys.readouterr()
    return json.loads(told), err


def test_the_embedded_model_is_calibrated_with_its_own_texts(capsys, tmp_path):
    told, _ = calibrate(capsys, tmp_path, "--tokens", "1000")
    assert told["what"] == "channels"
    assert told["layers"] == 4
    assert 512 < told["tokens"] <= 1000
    made = load(told["file"], "channels")
    assert made.data["tokens"] == told["tokens"]
    order = order_of(made)
    assert list(order) == [0, 1, 2, 3]
    assert all([len(head) for head in heads] == [32, 32] for heads in order.values())


def test_a_text_is_read(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The grass is green. The sky is blue. " * 100)
    told, _ = calibrate(capsys, tmp_path, "--text", str(text), "--tokens", "600")
    assert told["tokens"] == 600


def test_without_json_one_line_says_what_was_done(capsys, tmp_path):
    out = tmp_path / "channels.json"
    assert main(["calibrate", "--what", "channels", "--out", str(out), "--tokens", "100"]) == 0
    assert capsys.readouterr().out == f"channels of 4 layers, measured on 100 tokens: {out}\n"


def test_rotated_channels_are_put_in_order(capsys, tmp_path):
    out = tmp_path / "rotated.json"
    assert main(["calibrate", "--what", "rotated", "--out", str(out), "--tokens", "100"]) == 0
    assert capsys.readouterr().out == f"rotated of 4 layers, measured on 100 tokens: {out}\n"
    orders = parse(f"rotatekv(order={str(out)!r})").store.orders
    assert [(layer, sorted(order)) for layer, order in orders] == [(i, list(range(64))) for i in range(4)]


def test_query_heads_that_find_answers_are_searched_in_texts_with_answers(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate_command, "SAMPLES", 3)
    out = tmp_path / "semantic.json"
    assert main(["calibrate", "--what", "semantic", "--out", str(out), "--tokens", "300"]) == 0
    assert capsys.readouterr().out.startswith("semantic of 4 layers, measured on ")
    assert parse(f"compresskv(heads={str(out)!r}, budget=100)").calibrations[0].kind == "semantic"
    assert main(["calibrate", "--what", "semantic", "--out", str(out), "--tokens", "99"]) == 2
    assert "take 256 tokens; allow longer ones" in capsys.readouterr().err


def test_heads_are_searched_without_a_text(capsys, tmp_path):
    out = tmp_path / "razor.json"
    assert main(["calibrate", "--what", "razor", "--out", str(out), "--tokens", "301", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["what"], told["tokens"], told["layers"]) == ("razor", 301, 4)
    induction = scores_of(load(out, "razor"), "razor")["induction"]
    # One layer of the embedded model looks for what followed the same word before, with both of its heads.
    assert min(induction[1]) > 0.3 > 10 * max(max(heads) for layer, heads in induction.items() if layer != 1)
    assert parse(f"razorattention(heads={str(out)!r}, induction=0.25)").keep.whole == {(1, 0), (1, 1)}


def test_gates_are_trained(capsys, tmp_path):
    out = tmp_path / "duo.json"
    assert main(["calibrate", "--what", "duo", "--out", str(out), "--tokens", "800", "--steps", "2"]) == 0
    assert capsys.readouterr().out.startswith("duo of 4 layers, measured on ")
    made = load(out, "duo")
    assert (made.data["steps"], made.data["sinks"], made.data["window"]) == (2, 128, 256)
    assert 800 <= made.data["tokens"] <= 1600
    assert parse(f"duoattention(heads={str(out)!r})").keep.others == 4


def test_patterns_are_searched(capsys, tmp_path):
    out = tmp_path / "patterns.json"
    assert main(["calibrate", "--what", "patterns", "--out", str(out), "--tokens", "260"]) == 0
    assert capsys.readouterr().out == f"patterns of 4 layers, measured on 260 tokens: {out}\n"
    assert list(parse(f"minference(patterns={str(out)!r})").read.own) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--out", "x"], "the following arguments are required: --what"),
        (["--what", "channels"], "the following arguments are required: --out"),
        (["--what", "moods", "--out", "x"], "--what: invalid choice: 'moods'"),
        (["--what", "channels", "--out", "gone/x.json"], "Cannot write gone/x.json: there is no folder gone."),
        (["--what", "channels", "--out", "x", "--model", "./mine"], "A model of your own needs a text to calibrate"),
        (["--what", "channels", "--out", "x", "--model", "./mine", "--text", "t.txt"], "There is no model folder"),
        (["--what", "channels", "--out", "x", "--text", "gone.txt"], "Cannot read gone.txt"),
        (["--what", "channels", "--out", "x", "--text", "empty.txt"], "empty.txt is empty; give a text to calibrate"),
        (["--what", "channels", "--out", ".", "--tokens", "64"], "Cannot write .: it is a folder."),
        (["--what", "channels", "--out", ""], "Cannot write '': it is a folder"),
        (["--what", "channels", "--out", "pipe"], "Cannot write pipe: it is a pipe, not a file."),
        (["--what", "channels", "--out", "/dev/full"], "Cannot write /dev/full: it is a device, not a file."),
        (["--what", "channels", "--out", "loop"], "Cannot write loop: Too many levels of symbolic links."),
        (
            ["--what", "channels", "--out", "x", "--text", "x.txt"],
            "A calibration needs at least 64 tokens of text; there",
        ),
        (
            ["--what", "channels", "--out", "x", "--tokens", "1"],
            "A calibration needs at least 64 tokens of text; there is",
        ),
        (
            ["--what", "duo", "--out", "x", "--text", "x.txt"],
            "A calibration needs at least 64 tokens of text; there is 1",
        ),
        (["--what", "channels", "--out", "x", "--tokens", "9" * 30], "--tokens: must be a whole number from 1 to"),
        (["--what", "channels", "--out", "x", "--tokens", "0"], "--tokens: must be a whole number of at least 1"),
        (["--what", "channels", "--out", "x", "--steps", "2"], "--steps is for --what duo; leave it out"),
        (["--what", "razor", "--out", "x", "--text", "t.txt"], "razor reads random tokens; leave out --text"),
        (["--what", "razor", "--out", "x", "--tokens", "5"], "A period of random tokens must be from 32 to 3,4"),
        (["--what", "duo", "--out", "x", "--model", "./mine"], "A model of your own needs a text to calibrate with"),
        (["--what", "duo", "--out", "x", "--text", "t.txt", "--tokens", "9"], "9 tokens do not hold ten pass phrases"),
        (["--what", "duo", "--out", "x", "--steps", "1", "--tokens", "380"], "No text is longer than the 384 tokens"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_sentence(capsys, monkeypatch, tmp_path, argv, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("text " * 100)
    (tmp_path / "x.txt").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.txt").write_text("\n")
    assert main(["calibrate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"kvote: {sentence}")
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "loop", "pipe", "t.txt", "x.txt"]


def test_where_nothing_can_be_written_nothing_is_measured(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(calibrate_command, "load", lambda name: pytest.fail("a model was loaded"))
    assert main(["calibrate", "--what", "channels", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.endswith(": it is a folder.\n")


def test_what_a_model_does_on_the_way_is_one_sentence(capsys, monkeypatch, tmp_path):
    def fails(*given):
        raise RuntimeError("shapes do not match\nat all")

    monkeypatch.setitem(calibrate_command._MEASURES, "channels", fails)
    assert main(["calibrate", "--what", "channels", "--out", str(tmp_path / "x.json")]) == 2
    assert capsys.readouterr().err == "kvote: embedded cannot be calibrated: shapes do not match.\n"
