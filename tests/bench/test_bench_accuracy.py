"""bench/accuracy.py on a few questions: quality and bytes together, and what a stopped run leaves."""

import json
import sys

import pytest
from matplotlib import image


@pytest.fixture
def run(results, monkeypatch, capsys):
    """Runs the script with few questions and returns what it wrote."""
    import accuracy

    def call(*argv: str) -> tuple[dict, str]:
        monkeypatch.setattr(sys, "argv", ["accuracy.py", "--samples", "2", *argv])
        accuracy.main()
        return json.loads((results / "accuracy.json").read_text()), capsys.readouterr().out

    return call


def _share(held: dict, spec: str, task: str) -> tuple[float, float]:
    """Right answers, and bytes relative to dense."""
    found = {(p["spec"], p["task"]): p for p in held["points"] if p["way"] == "prompt"}
    mine, dense = found[spec, task], found["dense", task]
    return mine["right"].count("1") / len(mine["right"]), mine["bytes"] / dense["bytes"]


@pytest.mark.slow
def test_snapkv_answers_from_a_quarter_of_the_bytes_and_chance_does_not(run, results):
    held, out = run("--methods", "snapkv")
    for task in ("needle", "several", "pass key"):
        assert _share(held, "dense", task) == (1.0, 1.0)
        right, nbytes = _share(held, "snapkv(budget=0.25)", task)
        assert right == 1.0
        assert nbytes < 0.35
    rows = {row["share"]: row for row in held["rows"]}
    assert rows.keys() == {1.0, 0.5, 0.25, 0.125, 0.0625}
    chance = rows[0.25]["chance"]
    assert chance.startswith("randomkeep(budget=")
    right, nbytes = _share(held, chance, "several")
    assert right == 0.0
    assert nbytes <= 1.02 * _share(held, "snapkv(budget=0.25)", "several")[1]
    dropped = {p["spec"]: p["dropped"] for p in held["points"]}
    assert all(count > 0 for spec, count in dropped.items() if spec != "dense")
    # Two questions per task prove nothing.
    assert "Not better than random: snapkv at 50%, 25%, 12.5%, 6.25%." in out
    assert (results / "accuracy.md").read_text().strip() in out
    assert image.imread(results / "accuracy.png").shape[1] > 1000


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(run, monkeypatch):
    import accuracy

    first, _ = run("--methods", "tidaldecode")
    assert {p["way"] for p in first["points"]} == {"steps"}
    assert all(p["reused"] > 0 for p in first["points"] if p["spec"].startswith("tidaldecode"))
    monkeypatch.setattr(accuracy.Examiner, "sit", None)
    again, _ = run("--methods", "tidaldecode")
    assert again["points"] == first["points"]


def test_a_method_that_does_nothing_ends_the_run(run, monkeypatch):
    import accuracy
    from subjects import Subject

    idle = Subject("idle", {0.5: "snapkv(budget=2000)"}, "snapkv")
    monkeypatch.setattr(accuracy, "known", lambda names: [idle])
    with pytest.raises(SystemExit, match=r"snapkv\(budget=2000\) did not act on needle: nothing dropped"):
        run("--methods", "idle")


def test_a_question_asked_later_is_one_that_snapkv_has_not_seen(run):
    held, out = run("--methods", "snapkv", "--ways", "later")
    right = [p["right"] for p in held["points"] if p["spec"] == "snapkv(budget=0.0625)" and p["task"] != "pass key"]
    assert set("".join(right)) == {"0"}
    assert "asked after the prompt was read and cut down" in out
