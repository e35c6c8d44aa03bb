"""`kvote eval`, from the command line to the page, on the embedded model."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvote import InputError, models
from kvote.cli import main
from kvote.cli.eval import open_subject
from kvote.eval.folder import SAMPLES, append, appending, open_folder, read_records
from kvote.eval.plan import Plan, Unit, make, with_budget
from kvote.eval.run import pending
from kvote.eval.sample import Question, Sample
from kvote.eval.template import template_of

SPEC = "tokenselect(top_k=64, sinks=8, window=64, chunk=64)"


def by_words(text: str) -> int:
    return len(text.split())


def command(out: Path, *more: str) -> int:
    given = ["eval", "--out", str(out), "--lengths", "400", "--samples", "1", "--no-baselines", "--methods", SPEC]
    return main([*given, *more])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval")
    assert command(out) == 0
    return out


def test_every_sample_is_a_line_with_what_it_scored_and_cost(measured):
    records = read_records(measured)
    assert {record["name"] for record in records.values()} == {"dense", SPEC}
    dense, selected = records["world/400/0/dense"], records[f"world/400/0/{SPEC}"]
    assert dense["score"] >= 0.75
    assert dense["expected"] == selected["expected"]
    assert dense["document_tokens"] == 400
    assert selected["tokens_read"] < 160 < dense["tokens_read"]


def test_a_second_run_goes_on_where_the_first_stopped(measured, tmp_path, capsys):
    for name in ("manifest.json", SAMPLES):
        (tmp_path / name).write_bytes((measured / name).read_bytes())
    before = (tmp_path / SAMPLES).read_bytes()
    assert command(tmp_path) == 0
    assert (tmp_path / SAMPLES).read_bytes() == before
    # What a crash cut off is measured again, and nothing else.
    (tmp_path / SAMPLES).write_bytes(before[:-20])
    assert command(tmp_path, "--json") == 0
    said = json.loads(capsys.readouterr().out.split("report.html\n")[-1])
    assert said["measured"] == 1
    assert read_records(tmp_path).keys() == read_records(measured).keys()
    assert len(json.loads((tmp_path / "manifest.json").read_text())["runs"]) == 3


def test_samples_of_another_seed_do_not_come_into_the_same_folder(measured, capsys):
    before = (measured / SAMPLES).read_bytes()
    assert command(measured, "--seed", "1") == 2
    assert "another seed" in capsys.readouterr().err
    assert (measured / SAMPLES).read_bytes() == before


def test_the_page_needs_nothing_else(measured):
    page = (measured / "report.html").read_text()
    assert SPEC in page
    assert page.count("<svg") == 3
    assert "<script" not in page
    assert "http" not in page.replace("https://github.com", "")


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    with appending(tmp_path), pytest.raises(InputError, match="Another kvote eval"), appending(tmp_path):
        pass


def test_a_damaged_line_is_refused(tmp_path):
    with appending(tmp_path) as out:
        append(out, {"key": "a"})
    (tmp_path / SAMPLES).write_bytes(b"{\n" + (tmp_path / SAMPLES).read_bytes())
    with pytest.raises(InputError, match="Line 1"):
        read_records(tmp_path)


def test_samples_without_a_manifest_are_not_gone_on_with(tmp_path):
    (tmp_path / SAMPLES).write_bytes(b"")
    with pytest.raises(InputError, match="without manifest"):
        open_folder(tmp_path, {"run": {}})


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--tasks", "niah"], "no task 'niah'"),
        (["--files", "longbench=nowhere.jsonl"], "Cannot read"),
        (["--budgets", "50"], "given its top_k already"),
        (["--report", "nowhere"], "Cannot read"),
        (["--methods", "tokenselekt"], "did you mean"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_measured(more, said, tmp_path, capsys):
    assert command(tmp_path / "new", *more) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("spec", "budget", "sized"),
    [
        ("snapkv", 0.25, "snapkv(budget=250)"),
        ("tokenselect(sinks=4, window=100)", 600, "tokenselect(sinks=4, window=100, top_k=496)"),
        ("streamingllm(sinks=4)", 0.1, "streamingllm(sinks=4, window=96)"),
        ("quest", 512, "quest(token_budget=512)"),
    ],
)
def test_a_budget_counts_all_that_a_method_reads_or_keeps(spec, budget, sized):
    assert with_budget(spec, budget, 1000) == sized


def test_samples_are_taken_across_tasks_and_lengths_first(tmp_path):
    plan = Plan(("facts", "vt"), (512, 1024), 2, ("dense",))
    order = [(unit.index, unit.length, unit.task) for unit, _ in pending(plan, tmp_path)]
    assert order == sorted(order)
    assert len(order) == 8


class Talker:
    """A tokenizer's template, as far as it is looked at."""

    chat_template = "yes"

    def apply_chat_template(self, talk: list[dict[str, str]], **_: Any) -> str:
        return "".join(f"<{one['role']}>{one['content']}</>" for one in talk) + "<assistant>"


def test_document_and_question_share_one_message_of_a_chat():
    template = template_of(Talker())
    assert template.opening("D") == "<user>D"
    assert template.asking(Question("Q", (), lead="L")) == "\n\nQ</><assistant>L"
    assert template.next == "</><user>"
    assert template_of(Talker(), raw=True).asking(Question("Q", (), lead="L")) == "\n\nQuestion: Q\nAnswer: L"


def test_the_embedded_model_is_asked_in_its_own_language():
    subject = open_subject(None, raw=False, dtype=None)
    assert subject.name == models.embedded() or subject.name == "embedded"
    assert subject.template.opening("x") == "x"
    sample: Sample = make(Unit("world", 400, 0, ()), 0, subject.count)
    assert subject.ids(sample.document, first=True).shape[1] == 400
