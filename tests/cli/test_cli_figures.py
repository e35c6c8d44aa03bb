"""What ``kvote methods`` tells of measurements: only what the shipped file holds."""

import json
import re

import pytest

from kvote.cli import figures, main, methods, page
from kvote.cli.figures import Figures

MACHINE = {"cpu": "a CPU", "threads": 2, "torch": "2.0"}
ANSWERS = {"spec": "snapkv(budget=0.25)", "share": 0.25, "questions": 144, "read": 0.25}
STEP = {"shortest_ms": 1.0, "longest_ms": 3.0, "to_packed": 6.5, "to_as_it_comes": 60.2, "to_dense": 1.9, "bytes": 0.26}


@pytest.fixture
def held(monkeypatch) -> dict:
    answers = [
        {"name": "snapkv", **ANSWERS, "accuracy": 0.9, "bytes": 0.31, "random": 0.4, "verdict": "beats"},
        {"name": "h2o", **ANSWERS, "accuracy": 0.41, "bytes": 0.31, "random": 0.4, "verdict": "equals"},
        {"name": "tokenselect", **ANSWERS, "accuracy": 0.8, "bytes": 1.01, "random": None, "verdict": None},
    ]
    steps = [
        {"name": "snapkv", "spec": "snapkv(budget=0.25)", "tokens": 32768, "ms": 2.04, **STEP},
        {"name": "kivi | tokenselect", "spec": "kivi | tokenselect", "tokens": 32768, "ms": 4.0, **STEP},
    ]
    made = {
        "accuracy": {"command": "python bench/accuracy.py", "machine": MACHINE, "tokens": 1024, "rows": answers},
        "steps": {"command": "python bench/methods.py", "machine": MACHINE, "rows": steps},
    }
    for module in (methods, page):
        monkeypatch.setattr(module, "figures", lambda: Figures(made))
    return made


def test_figures_stand_on_the_page_of_the_method_that_they_are_about(held, capsys):
    assert main(["methods", "snapkv"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "- right answers at 1,024 tokens: 90% (31% of the bytes, random 40%)" in words
    step = "32,768 tokens 2.0 ms, 6.5x sdpa packed, 60x sdpa as transformers calls it, 1.9x dense, 26% of the bytes"
    assert f"- decode step of a layer: {step}" in words
    assert "- with python bench/accuracy.py on a CPU, 2 threads, torch 2.0" in words
    assert "kivi | tokenselect" not in words
    assert main(["methods", "h2o"]) == 0
    assert "41% (31% of the bytes, random 40%, no better than random)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["kivi", "tokenselect"])
def test_methods_that_are_joined_stand_on_the_page_of_each(held, capsys, name):
    assert main(["methods", name]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "- kivi | tokenselect: decode step of a layer: 32,768 tokens 4.0 ms" in words
    assert ("- right answers at 1,024 tokens: 80% (25% of the tokens read)" in words) == (name == "tokenselect")


def test_the_same_as_json(held, capsys):
    assert main(["methods", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in told["methods"]}
    assert rows["snapkv"]["accuracy"] == held["accuracy"]["rows"][:1]
    assert rows["snapkv"]["steps"] == held["steps"]["rows"][:1]
    assert rows["dense"]["accuracy"] == rows["dense"]["steps"] == []
    assert [row["name"] for row in told["variants"]] == ["kivi | tokenselect"]
    assert len(told["measured"]) == 2


def test_the_page_has_them_too(held, capsys):
    assert main(["methods", "--table"]) == 0
    out = capsys.readouterr().out
    assert "| snapkv | **90%** (31%; random 40%) |" in out
    assert "| h2o | 41% (31%; random 40%) |" in out
    assert "| tokenselect | 80% (reads 25%) |" in out
    assert "| `kivi \\| tokenselect` | 32,768 | 4.00 | 6.5x | 60x | 1.90x | 26% |" in out


def test_without_the_file_there_are_no_figures(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(figures, "_FILE", tmp_path / "none.json")
    figures.figures.cache_clear()
    assert main(["methods", "snapkv"]) == 0
    assert "Measured" not in capsys.readouterr().out
    figures.figures.cache_clear()


def test_every_figure_shipped_is_of_a_method_that_there_is():
    from kvote.method import METHODS

    for name in figures.figures().names:
        parts = [re.split(r"[(,]", part)[0].strip() for part in name.split("|")]
        assert all(part in METHODS for part in parts), name
