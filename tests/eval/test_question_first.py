"""Questions that are in the prompt of the document, so that a method which drops tokens knows what is asked."""

import json

import pytest

from kvote import Document
from kvote.cli import main
from kvote.cli.eval import open_subject
from kvote.eval.measure import Reference, measure
from kvote.eval.plan import Unit, make
from kvote.eval.read import Reading
from kvote.eval.sample import Question

TOKENS = 600
SPEC = "snapkv(budget=64)"


@pytest.fixture(scope="module")
def subject():
    return open_subject(None, raw=False, dtype=None)


@pytest.fixture(scope="module")
def sample(subject):
    return make(Unit("world", TOKENS, 0, ()), 0, subject.count)


def answers(subject, sample, **more):
    return measure(subject, sample, SPEC, Reference(), **more)


def test_every_question_is_answered_as_document_does_with_question_first(subject, sample):
    document = Document(subject.model, subject.tokenizer, sample.document, SPEC, raw=True, lazy=True)
    first = answers(subject, sample, question_first=True)
    for question, found in zip(sample.questions, first["answer_ids"], strict=True):
        expected = document.ask(question.text, max_new_tokens=question.room, question_first=True)
        assert expected.token_ids[: len(found)] == found
    later = answers(subject, sample)
    assert later["answer_ids"] != first["answer_ids"]
    assert later["score"] < first["score"]


def test_dense_attention_answers_alike_in_both_ways(subject, sample):
    dense = measure(subject, sample, "dense", Reference(), question_first=True)
    later = measure(subject, sample, "dense", Reference())
    assert dense["answer_ids"] == later["answer_ids"]
    assert dense["document_tokens"] == later["document_tokens"] == TOKENS


def test_a_talk_goes_on_from_its_first_question(subject, sample):
    dense = Reading(subject, "dense", sample.document)
    first = Reading(subject, "dense", sample.document, question_first=True)
    asked = [Question(one.text, one.answers, room=4) for one in sample.questions[:2]]
    for i, question in enumerate(asked):
        assert first.turn(question, opening=i == 0).tokens == dense.turn(question, opening=i == 0).tokens
    assert first.cache.get_seq_length() == dense.cache.get_seq_length()


def test_the_two_ways_do_not_come_into_one_folder(tmp_path, capsys):
    given = ["eval", "--out", str(tmp_path), "--lengths", "300", "--samples", "1", "--no-baselines", "--methods", SPEC]
    assert main([*given, "--question-first"]) == 0
    assert "in one prompt with the document" in json.loads((tmp_path / "manifest.json").read_text())["asked"]
    assert "in one prompt with the document" in (tmp_path / "report.html").read_text()
    keys = [json.loads(line)["key"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert keys == ["world/300/0/dense/question first", f"world/300/0/{SPEC}/question first"]
    assert main(given) == 2
    assert "another way of asking" in capsys.readouterr().err
