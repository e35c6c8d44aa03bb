import json

import pytest

from kvote.calibration import load
from kvote.calibration.channels import order_of
from kvote.cli import main


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
        (["--what", "channels", "--out", "x", "--tokens", "0"], "--tokens: must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_sentence(capsys, monkeypatch, tmp_path, argv, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("text")
    (tmp_path / "empty.txt").write_text("\n")
    assert main(["calibrate", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"kvote: {sentence}")
    assert err.count("\n") == 1
