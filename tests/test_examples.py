"""The scripts of examples/, run as a reader would, on the embedded model."""

import json
import re
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_a_text_longer_than_the_model_knows_is_asked_and_tokenselect_alone_finds_what_is_hidden(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ask_a_novel.py"])
    made = runpy.run_path(str(EXAMPLES / "ask_a_novel.py"))
    said = capsys.readouterr().out
    found = dict(re.findall(r"^(\w+).*: (\d) of 1 found, in a text of 3,\d+ tokens$", said, re.M))
    assert found == {"dense": "0", "streamingllm": "0", "tokenselect": "1"}
    assert int(re.findall(r"read ([\d,]+) tokens", said)[-1].replace(",", "")) <= made["trained"]
    (asked, right), *_ = made["questions"].items()
    assert f"\n{asked} {right}\n" in said  # as it was streamed

    # What a real model is asked instead.
    text, questions = made["novel"](3000)
    told = [f" It was well known that {name} was born in the town of {town}. " for name, town in made["BORN"].items()]
    assert list(questions.values()) == list(made["BORN"].values())
    places = [text.index(sentence) for sentence in told]
    assert places == sorted(places)
    assert places[0] > 500
    assert places[-1] < len(text) - 500


def test_answers_of_an_evaluation_are_shown_beside_what_was_right(capsys, monkeypatch, tmp_path):
    kept = {"name": "kivi", "document_tokens": 12000, "tokens_read": 12010}
    told = {**kept, "scores": [1.0, 0.0], "expected": [["71"], ["35", "36"]], "answers": ["71.\nIt is", "36"]}
    records = [told, {"name": "dense", "refused": "too long"}, {**kept, "task": "perplexity", "answers": None}]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(sys, "argv", ["show_answers.py", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "show_answers.py"))
    said = capsys.readouterr().out
    assert "kivi: 1 of 2 right\n  a text of 12,000 tokens, of which a query read 12,010\n" in said
    assert "    right  71: 71. It is\n    wrong  35, 36: 36\n" in said
    assert "dense: 0 of 0 right" in said
