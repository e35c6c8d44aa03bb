"""bench/methods.py on few tokens, and the figures that go into the package."""

import json
import sys

import pytest
import torch

from kvote.kernels import cpu
from kvote.measure import Geometry, check, sweep

pytestmark = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))
NAMES = ["dense", "h2o", "tidaldecode", "doublesparsity", "snapkv | tokenselect"]


@pytest.fixture
def run(results, monkeypatch, capsys):
    import methods

    monkeypatch.setattr(sweep, "_BYTES", 1 << 12)
    monkeypatch.setattr(methods, "Geometry", lambda: Geometry(4, 2, 32, torch.bfloat16))

    def call(*argv: str) -> tuple[list[dict], str]:
        monkeypatch.setattr(sys, "argv", ["methods.py", "--tokens", "4096", "--rounds", "1", *argv])
        methods.main()
        return json.loads((results / "methods.json").read_text())["points"], capsys.readouterr().out

    return call


def test_every_method_is_checked_timed_and_has_acted(run, monkeypatch):
    import methods

    points, out = run("--methods", *NAMES)
    assert [p["name"] for p in points] == NAMES
    for point in points:
        assert 0 < point["shortest_ms"] <= point["ms"] <= point["longest_ms"]
        assert all(point[key] > 0 for key in ("to_packed", "to_as_it_comes", "to_dense"))
        assert point["spec"].split("(")[0] in out
    by_name = {p["name"]: p for p in points}
    assert by_name["h2o"]["dropped"] > 2048
    assert by_name["h2o"]["bytes_to_dense"] < 0.3
    assert by_name["tidaldecode"]["reused"] > 0
    assert by_name["doublesparsity"]["selections"] > 0
    monkeypatch.setattr(methods, "measure", None)
    assert run("--methods", *NAMES)[0] == points


def test_a_round_of_what_drops_is_whole_bursts(run, monkeypatch):
    import methods

    steps, parts = [], methods.from_drop_to_drop

    def watched(call, before, layers):
        taken = 0

        def counted(first):
            nonlocal taken
            taken += 1
            return call(first)

        before_it = methods.dropped(layers)
        seconds = parts(counted, before, layers)
        steps.append((taken, methods.dropped(layers) - before_it))
        return seconds

    monkeypatch.setattr(methods, "from_drop_to_drop", watched)
    run("--methods", "dense", "snapkv", "streamingllm")
    # A window of 1,020 tokens lets 15 go at once. The check let go of some, and one call went before the first round.
    assert steps == [(14, 15), (15, 15), (15, 15)]


def test_a_wrong_answer_means_no_figures(run, monkeypatch, results):
    def wrong(name, layer, geometry):
        if name == "h2o":
            raise check.WrongAnswerError(f"{name} is off.")

    monkeypatch.setattr(check, "decoding", wrong)
    points, out = run("--methods", "dense", "h2o")
    assert [p["name"] for p in points] == ["dense"]
    assert "h2o: no figures, h2o is off." in out


def test_figures_are_those_of_the_results(run, results, monkeypatch):
    import figures
    from accuracy_table import TASKS

    points, _ = run("--methods", "dense")
    same = {"bytes": 10, "read": 5}
    asked = [
        {"spec": spec, "way": "prompt", "task": task, "right": right * 10, **same}
        for task in TASKS
        for spec, right in (("dense", "11"), ("x(y=1)", "11"), ("randomkeep(budget=64)", "00"))
    ]
    rows = [{"name": "x", "share": 0.5, "way": "prompt", "spec": "x(y=1)", "kind": "keep"}]
    rows[0]["chance"] = "randomkeep(budget=64)"
    told = {"command": "c", "machine": {}, "tokens": 1024, "rows": rows, "points": asked}
    (results / "accuracy.json").write_text(json.dumps(told))
    monkeypatch.setattr(figures, "TARGET", results / "figures.json")
    figures.main()
    made = json.loads((results / "figures.json").read_text())
    (answered,), (stepped,) = made["accuracy"]["rows"], made["steps"]["rows"]
    assert (answered["accuracy"], answered["random"], answered["verdict"]) == (1.0, 0.0, "beats")
    assert stepped["spec"] == "dense"
    assert stepped["ms"] == round(points[0]["ms"], 4)
