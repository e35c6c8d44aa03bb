"""Files of published benchmarks: small ones made by hand in their formats."""

import json

import pytest

from kvote import InputError
from kvote.cli.eval import open_subject
from kvote.eval.choosing import with_rows
from kvote.eval.files import file_tasks
from kvote.eval.folder import open_folder
from kvote.eval.metrics import METRICS, classified
from kvote.eval.plan import Plan, Unit, make
from kvote.eval.run import records_of
from kvote.eval.sample import Question
from kvote.eval.score import score
from kvote.models import world

BENCH = {"dataset": "hotpotqa", "input": "Who?", "context": "Ann did.", "answers": ["Ann"], "all_classes": None}
V2 = {
    "_id": "1",
    "question": "Who?",
    "choice_A": "Ann",
    "choice_B": "Bob",
    "choice_C": "Cid",
    "choice_D": "Dee",
    "answer": "B",
    "context": "Bob did.",
}
CHOICE = {"id": 0, "context": "c", "input": "q", "answer": ["y"], "options": ["x", "y", "z", "w"]}
RAG = {"question": "Who?", "answers": ["Ann", "Annie"], "ctxs": [{"title": "T", "text": "Ann did."}]}
KV = {"question": "k", "answer": "v", "context": '{"k": "v"}', "num_kvs": 1, "demos": []}
NEEDLE = {"context": "c", "query": "a, b", "type_needle_v": "numbers", "outputs": ["1", "2"], "example": ""}
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": f"Paragraph {i} is about number {i} and says nothing else of any note.",
                    "qas": [
                        {"question": f"Number {i}?", "answers": [{"text": f"number {i}"}], "is_impossible": False},
                        {"question": "None?", "answers": [], "is_impossible": True},
                    ],
                }
                for i in range(40)
            ],
        }
    ],
}
HOTPOT = [
    {
        "question": f"Q{i}?",
        "answer": f"a{i}",
        "supporting_facts": [[f"T{i}", 0], [f"U{i}", 0]],
        "context": [[f"{t}{i}", [f"{t} and {i}.", " More."]] for t in "TUV"],
    }
    for i in range(10)
]


def by_words(text):
    return len(text.split())


def lines(*held):
    return "\n".join(json.dumps(one) for one in held)


@pytest.fixture
def tasks(tmp_path):
    def write(kind, name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return file_tasks(f"{kind}={tmp_path / name}")

    file_tasks.cache_clear()
    return write


@pytest.mark.parametrize(
    ("kind", "name", "held", "task", "document", "wanted"),
    [
        ("longbench", "hotpotqa.jsonl", BENCH, "longbench:hotpotqa", "Ann did.", ("Ann", "f1")),
        ("longbench2", "data.json", [V2], "longbench2:data", "Bob did.", ("B", "letter")),
        (
            "infinitebench",
            "longbook_choice_eng.jsonl",
            CHOICE,
            "infinitebench:longbook_choice_eng",
            "c",
            ("B", "letter"),
        ),
        ("helmet", "nq.jsonl", RAG, "helmet:nq", "Document (Title: T): Ann did.", ("Ann", "any")),
        ("helmet", "kv.jsonl", KV, "helmet:kv", '{"k": "v"}', ("v", "any")),
        ("helmet", "niah.jsonl", NEEDLE, "helmet:niah", "c", ("1", "all")),
    ],
)
def test_a_published_format_becomes_a_document_and_a_question(tasks, kind, name, held, task, document, wanted):
    (found,) = tasks(kind, name, json.dumps(held))
    assert isinstance(found.held, tuple)
    (sample,) = found.held
    assert (found.name, sample.document) == (task, document)
    assert (sample.questions[0].answers[0], sample.questions[0].score) == wanted


def test_every_file_of_a_folder_is_a_task(tasks, tmp_path):
    tasks("longbench", "hotpotqa.jsonl", lines(BENCH, BENCH))
    (tmp_path / "trec.jsonl").write_text(json.dumps(BENCH | {"dataset": "trec", "all_classes": ["Ann", "An"]}))
    (tmp_path / "notes.txt").write_text("no data")
    assert [one.name for one in file_tasks(f"longbench={tmp_path}")] == ["longbench:hotpotqa", "longbench:trec"]


@pytest.mark.parametrize(
    ("kind", "name", "text", "said"),
    [
        ("longbench", "a.jsonl", "", "holds no records"),
        ("longbench", "a.jsonl", lines(BENCH) + "\n{", "Line 2 of .* is no JSON"),
        ("longbench", "a.jsonl", "[1]", "no JSON object"),
        ("longbench", "a.jsonl", lines({**BENCH, "answers": []}), "no texts under 'answers'"),
        ("longbench", "a.jsonl", lines({**BENCH, "context": None}), "no text under 'context'"),
        ("longbench", "a.jsonl", lines({**BENCH, "dataset": "new"}), "unknown data set 'new'"),
        ("longbench", "a.jsonl", lines({**BENCH, "dataset": "vcsum"}), "segmenter"),
        ("longbench", "a.jsonl", '{"a": 1, "a": 2}', "twice"),
        ("longbench2", "a.json", json.dumps({"x": 1}), "no list of records"),
        ("longbench2", "a.json", json.dumps([V2 | {"answer": "E"}]), "no letter"),
        ("longbench2", "a.json", json.dumps([V2 | {"answer": ""}]), "no letter"),
        ("infinitebench", "unknown.jsonl", lines(CHOICE), "none of the files"),
        ("infinitebench", "code_debug.jsonl", lines({**CHOICE, "answer": ["q"]}), "four options"),
        ("infinitebench", "passkey.jsonl", lines(CHOICE), "no number"),
        ("helmet", "a.jsonl", lines({"qid": 1, "ctxs": []}), "none of HELMET's tasks"),
        ("helmet", "a.jsonl", lines({**RAG, "ctxs": [1]}), "no list of passages"),
        ("squad", "a.json", "{}", "no list of objects under 'data'"),
        ("squad", "a.json", json.dumps({"data": []}), "no question with an answer"),
        ("hotpotqa", "a.json", json.dumps([{**HOTPOT[0], "context": [["T"]]}]), "no titles with sentences"),
        ("hotpotqa", "a.json", json.dumps([{**HOTPOT[0], "context": 5}]), "no titles with sentences"),
        ("nothing", "a.json", "{}", "takes FORMAT=PATH"),
    ],
)
def test_a_malformed_file_is_one_sentence(tasks, kind, name, text, said):
    with pytest.raises(InputError, match=said) as caught:
        tasks(kind, name, text)
    assert str(caught.value).count("\n") == 0


def test_bytes_that_are_no_text_and_missing_files_are_refused(tasks, tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="no UTF-8"):
        file_tasks(f"longbench={tmp_path / 'b.jsonl'}")
    with pytest.raises(InputError, match="Cannot read"):
        file_tasks(f"longbench={tmp_path / 'none.jsonl'}")


@pytest.mark.parametrize(("kind", "held", "name"), [("squad", SQUAD, "qa_1"), ("hotpotqa", HOTPOT, "qa_2")])
def test_rulers_questions_are_asked_over_documents_of_the_length(tasks, kind, held, name):
    (task,) = tasks(kind, "dev.json", json.dumps(held))
    for index in range(5):
        sample = make(Unit(name, 120, index, ()), 0, by_words, {name: task})
        (question,) = sample.questions
        assert 90 < by_words(sample.document) <= 120
        number = question.answers[0].removeprefix("a").removeprefix("number ")
        # The paragraphs that answer it are there, once each.
        about = [f"Paragraph {number} "] if kind == "squad" else [f"\n{t}{number}\n" for t in "TU"]
        assert all(sample.document.count(text) == 1 for text in about)
        assert make(Unit(name, 120, index, ()), 0, by_words, {name: task}) == sample
    with pytest.raises(InputError, match="no room"):
        make(Unit(name, 3, 0, ()), 0, by_words, {name: task})


def test_samples_of_a_file_are_measured_at_the_length_they_have(tasks, tmp_path):
    sizes = (10, 20, 30, 40, 400)
    tasks("longbench", "a.jsonl", lines(*({**BENCH, "context": "w " * size} for size in sizes)))
    plan = Plan((), (25, 50), 2, ("dense",), files=(f"longbench={tmp_path / 'a.jsonl'}",))
    found, missing = with_rows(plan, by_words)
    assert {length: sorted(sizes[row] for row in rows) for _, length, rows in found.chosen} == {
        25: [10, 20],
        50: [30, 40],
    }
    assert missing == []
    assert sorted((unit.length, unit.index) for unit in found.units()) == [(25, 0), (25, 1), (50, 2), (50, 3)]
    _, missing = with_rows(Plan((), (25,), 3, ("dense",), files=plan.files), by_words)
    assert missing == ["longbench:a holds 2 of 3 samples for 25 tokens."]
    with pytest.raises(InputError, match="no sample of at most 5 tokens"):
        with_rows(Plan((), (5,), 1, ("dense",), files=plan.files), by_words)


@pytest.mark.parametrize(
    ("name", "said", "wanted", "right"),
    [
        ("f1", "The answer: Ann Lee.", "Ann Lee", 0.8),
        ("f1", "nobody", "Ann", 0.0),
        ("f1_of_characters", "北京。", "北京", 1.0),
        ("rouge", "a cat sat on mats", "cat on the mats", 6 / 7),
        ("rouge", "", "x", 0.0),
        ("numbers", "Paragraph 7, or 8", "Paragraph 7", 0.5),
        ("first_number", "It is 4.50, not 3", "4.5", 1.0),
        ("last_number", "returns -12.", "-12", 1.0),
        ("code", "# note\nx = 1", "x = 1", 1.0),
        ("letter", "The right choice is (C).", "C", 1.0),
        ("letter", "About B", "A", 0.0),
    ],
)
def test_scores_of_benchmarks(name, said, wanted, right):
    assert METRICS[name](said, wanted) == pytest.approx(right)


def test_a_class_is_right_if_no_other_is_named():
    assert classified("Location of a city", "city", ("city", "person")) == 1.0
    assert classified("city or person", "city", ("city", "person")) == 0.5
    assert classified("other city", "other city", ("city", "other city")) == 1.0
    assert score("city\nperson", Question("?", ("city",), "classes", classes=("city", "person"), one_line=True)) == 1.0


def test_samples_of_another_file_do_not_come_into_the_same_folder(tmp_path):
    first = {"runs": [], "run": {"files": {"longbench:a": "0"}}}
    open_folder(tmp_path, {"format": 1, **first})
    open_folder(tmp_path, {"format": 1, "run": {"files": {"longbench:b": "1"}}})
    open_folder(tmp_path, {"format": 1, "run": {}})
    with pytest.raises(InputError, match="another file of longbench:a"):
        open_folder(tmp_path, {"format": 1, "run": {"files": {"longbench:a": "2"}}})


def test_samples_of_a_file_are_records_under_their_number_in_it(tasks, tmp_path):
    made = world.sample("needle", 150, 0, 2, 1)
    held = {**BENCH, "context": made.document, "input": made.questions[0].prompt, "answers": [made.questions[0].answer]}
    tasks("longbench", "hotpotqa.jsonl", lines({**held, "context": made.document * 9}, held))
    subject = open_subject(None, raw=False, dtype=None)
    plan = Plan((), (200,), 1, ("dense",), files=(f"longbench={tmp_path / 'hotpotqa.jsonl'}",))
    plan, _ = with_rows(plan, subject.count)
    (unit,) = plan.units()
    (record,) = records_of(plan, unit, ["dense"], subject)
    assert record["key"] == "longbench:hotpotqa/200/1/dense"
    assert record["expected"] == [[made.questions[0].answer]]
    assert 0.0 <= record["score"] <= 1.0
