"""The tasks of `kvote eval`: what they make, and how answers are scored."""

import re

import pytest

from kvote import InputError
from kvote.cli.eval import open_subject
from kvote.eval import prose
from kvote.eval.estimate import Speed
from kvote.eval.measure import Reference, measure
from kvote.eval.plan import Plan, Unit, make
from kvote.eval.read import Reading
from kvote.eval.sample import Question, Sample
from kvote.eval.score import score
from kvote.eval.tasks import PROSE


def by_words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("task", [name for name in PROSE if name != "perplexity"])
def test_a_document_has_the_length_asked_for_and_holds_its_answers(task):
    unit = Unit(task, 1500, 3, ())
    sample = make(unit, 0, by_words)
    assert 0.85 * 1500 < by_words(sample.document) < 1.1 * 1500
    assert sample.questions
    assert all(answer in sample.document for question in sample.questions for answer in question.answers)
    assert make(unit, 0, by_words) == sample
    assert make(Unit(task, 1500, 4, ()), 0, by_words) != sample


def test_the_continuation_of_a_book_is_what_follows_in_it():
    sample = make(Unit("perplexity", 1500, 0, ()), 0, by_words)
    assert f"{sample.document}{sample.continuation}" in " ".join(prose.sentences())


def test_too_short_a_document_is_refused():
    with pytest.raises(InputError, match="no room"):
        make(Unit("niah_multivalue", 20, 0, ()), 0, by_words)


def test_answers_are_scored_by_what_comes_in_them():
    four = Question("?", ("11", "22", "33", "44"))
    assert score("It is 22, and 44.", four) == 0.5
    assert score("It is 22.", Question("?", ("11", "22"), score="any")) == 1.0
    assert score("It is 11.", Question("?", ("11",), score="exact")) == 0.0
    assert score(" oboe", Question("?", ("Oboe",))) == 1.0
    five = Question("?", tuple("12345"), score="run")
    assert score("1, 2, 3, 5, 5", five) == 0.6
    assert score("1, 2, 3, 4, 5, 6", five) == 1.0
    assert score("1, 2", five) == 0.4
    assert score("", five) == 0.0


def test_a_chain_is_answered_by_following_it_to_its_end():
    for index in range(20):
        sample = make(Unit("chains", 600, index, ()), 0, by_words)
        place: dict[str, str] = {}
        holder: dict[str, str] = {}
        fact = re.compile(r"(\w+ \w+) (?:went to the (\w+)|took the (\w+) along|handed the (\w+) to (\w+ \w+))\.")
        for who, where, taken, given, receiver in fact.findall(sample.document):
            if where:
                place[who] = where
            elif taken:
                holder[taken] = who
            elif holder[given] == who:
                holder[given] = receiver
        person, carried, handed = sample.questions
        assert place[" ".join(person.text.split()[2:4])] == person.answers[0]
        for question in (carried, handed):
            assert place[holder[question.text.split()[3]]] == question.answers[0]
        # Whoever handed it on has gone elsewhere, so the chain has to be followed.
        giver = next(who for who, _, _, given, _ in fact.findall(sample.document) if given)
        assert sum(giver in line for line in sample.document.split(". ")) >= 3


def test_later_turns_name_nobody():
    first, same, other, back = make(Unit("turns", 600, 0, ()), 0, by_words).questions
    names = [" ".join(re.findall(r"[A-Z]\w+ [A-Z]\w+", one.lead)[:1]) for one in (first, other)]
    assert len(set(names)) == 2
    assert not any(name.split()[0] in f"{one.text} {one.lead}" for name in names for one in (same, back))


def test_what_is_counted_and_copied_fills_the_length():
    counted = make(Unit("counting", 400, 0, ()), 0, by_words)
    question = counted.questions[0]
    assert 350 < question.room <= 400
    whole = question.lead + " " + ", ".join(question.answers)
    numbers = [int(one) for one in re.findall(r"\d+", whole)]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    copied = make(Unit("copying", 400, 0, ()), 0, by_words)
    assert ", ".join(copied.questions[0].answers) in copied.document
    assert 150 < len(copied.questions[0].answers) < copied.questions[0].room < 200


def test_a_book_is_measured_at_five_places_however_few_samples():
    units = list(Plan(("facts", "perplexity"), (512,), 2, ("dense",)).units())
    assert [unit.index for unit in units if unit.task == "perplexity"] == list(range(5))
    assert [unit.index for unit in units if unit.task == "facts"] == [0, 1]


def test_the_estimate_knows_what_is_written():
    speed = Speed(a=0.001, b=0.0, step=0.1)
    assert speed.seconds("counting", 1000) == pytest.approx(100.0)
    assert speed.seconds("copying", 1000) == pytest.approx(50.5)


@pytest.fixture(scope="module")
def subject():
    return open_subject(None, raw=False, dtype=None)


def test_turns_see_those_before_them(subject):
    sample = make(Unit("world_turns", 200, 0, ()), 0, subject.count)
    found = measure(subject, sample, "dense", Reference())
    assert found["score"] == 1.0
    apart = measure(subject, Sample(sample.document, sample.questions), "dense", Reference())
    # What the second question reads: the document alone, or the first question and its answer too.
    asked = subject.ids(subject.template.asking(sample.questions[0]), first=False).shape[1]
    assert found["tokens_read"] == apart["tokens_read"] + asked + len(found["answer_ids"][0])


def test_an_answer_that_fills_its_room_is_read_whole_by_the_next_turn(subject):
    sample = make(Unit("world", 200, 0, ()), 0, subject.count)
    first, second = (Question(one.text, one.answers, room=2) for one in sample.questions[:2])
    reading = Reading(subject, "dense", sample.document)
    said = reading.turn(first, opening=True).tokens
    assert len(said) == 2
    reading.turn(second, opening=False)
    asked = subject.ids(subject.template.asking(first), first=False).shape[1]
    again = subject.ids(subject.template.next + second.text, first=False).shape[1]
    # All but the very last token, which nothing follows.
    assert reading.cache.get_seq_length() == reading.ids.shape[1] + asked + 2 + again + 1


def test_a_prompt_is_read_again_for_a_method_that_wants_it(subject):
    sample = make(Unit("world", 200, 0, ()), 0, subject.count)
    found = measure(subject, sample, "kvzip(budget=100)", Reference())
    assert max(found["tokens_held"], 100) < Reading(subject, "dense", sample.document).ids.shape[1]


def test_methods_evict_while_they_write(subject):
    sample = make(Unit("world", 128, 0, ()), 0, subject.count)
    long = Sample(sample.document, (Question(sample.questions[0].text, ("1",), "run", room=24),))
    stops, endless = subject.stops, type(subject)(subject.name, subject.model, subject.tokenizer, subject.template)
    assert stops
    found = measure(endless, long, "h2o(budget=48)", Reference())
    assert len(found["answer_ids"][0]) == 24
    assert found["tokens_held"] <= 48
    assert found["document_tokens"] == 128
