import time

import numpy as np
import pytest

from kvote.models import tokenizer, world

TOKENIZER = tokenizer.build()


def ids_of(text: str, special: bool = False) -> list[int]:
    return TOKENIZER(text, add_special_tokens=special).input_ids


@pytest.mark.parametrize("task", world.TASKS)
@pytest.mark.parametrize("tokens", [160, 161, 1000])
def test_documents_have_the_length_asked_for_and_survive_the_tokenizer(task, tokens):
    for seed in range(12):
        made = world.sample(task, tokens, seed)
        ids = ids_of(made.document, special=True)
        assert len(ids) == tokens
        assert ids[0] == world.BOS
        assert ids[-1] == world.ID["."]
        assert not set(ids[1:]) & {world.PAD, world.BOS, world.EOT, world.UNK}
        assert TOKENIZER.decode(ids[1:]) == made.document
        for question in made.questions:
            for text in (question.prompt, question.answer):
                assert TOKENIZER.decode(ids_of(text)) == text
                assert world.UNK not in ids_of(text)


@pytest.mark.parametrize("task", ["needle", "turns", "passkey", "kv", "multi_value"])
def test_the_answer_stands_in_the_document_at_the_depth_claimed(task):
    for seed in range(20):
        made = world.sample(task, 700, seed, facts=6)
        ids = ids_of(made.document, special=True)
        for question in made.questions:
            start = round(question.depth * 700)
            value = ids_of(question.answer)[:2]
            near = ids[start : start + 14]
            assert any(near[i : i + 2] == value for i in range(len(near))), (near, value)


def test_multi_key_and_variables_point_at_their_first_fact():
    for seed in range(20):
        made = world.sample("multi_key", 500, seed)
        ids = ids_of(made.document, special=True)
        question = made.questions[0]
        named = {i for i in ids_of(question.answer) if world.FIRST_KEY <= i < world.FIRST_WORD}
        assert len(named) == 2
        assert min(ids.index(k) for k in named) == round(question.depth * 500) + 7  # "One of the … for" comes before

        made = world.sample("variables", 500, seed)
        ids = ids_of(made.document, special=True)
        head, _, tail = ids_of(made.questions[0].answer)
        start = round(made.questions[0].depth * 500)
        assert ids[start : start + 2] == [world.ID["VAR"], head]
        assert TOKENIZER.decode([world.ID["VAR"], tail, world.ID["="], world.ID["VAR"], head]) in made.document


def test_a_question_is_never_ambiguous():
    for seed in range(20):
        made = world.sample("needle", 900, seed, facts=40, questions=40)
        assert len({q.prompt for q in made.questions}) == 40
        assert len({q.answer.split()[0] for q in made.questions}) == 40
        assert all(made.document.count(q.answer) == 1 for q in made.questions)


def test_seeds_decide_the_sample_and_length_does_not_change_what_is_asked():
    one, same, other = (world.sample("needle", 400, seed) for seed in (3, 3, 4))
    assert one == same
    assert one.document != other.document
    assert one.questions != other.questions
    longer = world.sample("needle", 4000, 3)
    assert [(q.prompt, q.answer) for q in longer.questions] == [(q.prompt, q.answer) for q in one.questions]


def test_numbers_of_questions_and_facts():
    assert len(world.sample("turns", 400, 0).questions) == 2
    assert len(world.sample("turns", 400, 0, facts=5, questions=4).questions) == 4
    assert len(world.sample("kv", 400, 0, facts=30, questions=7).questions) == 7
    assert world.sample("kv", 400, 0, facts=30).document.count(";") == 29
    assert world.sample("needle", 400, 0, facts=9).document.count("magic numbers") == 9


def test_facts_spread_over_the_whole_document():
    depths = [world.sample("needle", 2000, seed, facts=1).questions[0].depth for seed in range(200)]
    assert np.histogram(depths, bins=4, range=(0, 1))[0].min() >= 25


def test_every_word_is_one_token():
    assert len(world.WORDS) == len(set(world.WORDS)) == world.VOCABULARY_SIZE == len(TOKENIZER)
    assert len(world.KEYS) == 1500
    for block in (world.NUMBERS, world.KEYS, world.WORDS[world.FIRST_WORD :]):
        assert all(ids_of(word) == [world.ID[word]] for word in block)
    assert world.ID["000"] == world.FIRST_NUMBER
    assert world.ID[world.KEYS[0]] == world.FIRST_KEY
    assert ids_of("917 <eot> What") == [world.ID["917"], world.EOT, world.ID["What"]]
    assert ids_of("xylophone") == [world.UNK]


def test_long_documents_build_fast():
    start = time.perf_counter()
    made = world.sample("needle", 200_000, 0, facts=50)
    assert time.perf_counter() - start < 5
    assert len(ids_of(made.document, special=True)) == 200_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("riddle", 100, 0), "unknown task 'riddle'"),
        (("needle", 20, 0), "need a document of at least 53 tokens, got 20"),
        (("needle", 100, 0, 0), "at least 1"),
        (("needle", 100_000, 0, 1501), "at most 1500 keys"),
    ],
)
def test_what_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        world.sample(*arguments)
