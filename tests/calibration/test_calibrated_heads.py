"""Files with scores of heads, and the texts that gates are trained with."""

from dataclasses import replace

import pytest
import scored
import tiny
from transformers import AutoTokenizer

from kvote import InputError
from kvote.calibration import load
from kvote.calibration.heads import DUO, RAZOR, as_data, scores_of
from kvote.calibration.texts import phrases, world_texts
from kvote.models import embedded, world
from kvote.models.tokenizer import build


def test_scores_are_those_of_the_file():
    net = tiny.model()
    path = scored.file(scored.razor(net, [[0.9, 0], [0.25, 1]], [[0, 0.5], [0.125, 0.75]]))
    assert scores_of(load(path, RAZOR), RAZOR) == {
        "induction": {0: (0.9, 0.0), 1: (0.25, 1.0)},
        "echo": {0: (0.0, 0.5), 1: (0.125, 0.75)},
    }
    assert scores_of(load(scored.file(scored.duo(net, [[0, 1], [1, 0]])), DUO), DUO)["gate"] == {0: (0, 1), 1: (1, 0)}


@pytest.mark.parametrize(
    "layers",
    [
        {},
        [],
        None,
        {"2": {"gate": [0.5, 0.5]}},
        {"00": {"gate": [0.5, 0.5]}},
        {"-1": {"gate": [0.5, 0.5]}},
        {"0": [0.5, 0.5]},
        {"0": {"gates": [0.5, 0.5]}},
        {"0": {"gate": [0.5, 0.5], "echo": [0.5, 0.5]}},
        {"0": {"gate": [0.5]}},
        {"0": {"gate": [0.5, 1.5]}},
        {"0": {"gate": [0.5, -0.1]}},
        {"0": {"gate": [0.5, True]}},
        {"0": {"gate": [0.5, "0.5"]}},
        {"0": {"gate": [0.5, None]}},
        {"0": {"gate": [0.5, 10**400]}},
        {"0": {"gate": [0.5, float("nan")]}},
    ],
    ids=range(17),
)
def test_scores_that_are_none_are_refused(layers):
    made = scored.duo(tiny.model(), [[0, 1], [1, 0]])
    with pytest.raises(InputError, match=r"^the calibration.*(scores of heads|model's with gate|from 0 to 1)"):
        scores_of(replace(made, data={"layers": layers}), DUO)


def test_scores_of_another_kind_are_refused():
    with pytest.raises(InputError, match=r"no layers with scores of heads \(razor\)"):
        scores_of(scored.duo(tiny.model(), [[0, 1], [1, 0]]), RAZOR)


def test_what_is_written_is_short_and_within_bounds():
    assert as_data({1: {"gate": [1.0000001, 1 / 3]}, 0: {"gate": [-1e-9, 0.5]}}) == {
        "0": {"gate": [0.0, 0.5]},
        "1": {"gate": [1.0, 0.333333]},
    }


TEXT = "The grass is green . The sky is blue . " * 7


@pytest.mark.parametrize("text", ["", "x", "The grass is green ."])
def test_a_text_that_says_next_to_nothing_is_refused(text):
    with pytest.raises(InputError, match=r"A calibration needs at least 64 tokens of text; there (is|are) [0-5]"):
        next(phrases(build(), text, 3000))


def test_phrases_are_told_once_and_asked_for_at_the_end():
    tokenizer = AutoTokenizer.from_pretrained(embedded())
    # Its words are known, so that what is no word of the text stands out.
    unknown, made = world.UNK, phrases(tokenizer, TEXT, 3000)
    lengths = set()
    for _ in range(20):
        example = next(made)
        ids = example.ids[0]
        assert len(ids) <= 3000
        assert int(ids[0]) == world.BOS
        lengths.add(len(ids))
        asked = int(example.labels.sum())
        assert bool(example.labels[-asked:].all())
        # Ten phrases of 32 words, once in the text and once in the answers.
        assert int((ids[:-asked] == unknown).sum()) >= 320 <= int((ids[-asked:] == unknown).sum())
        first = (ids == unknown).nonzero()[0]
        assert int(first) > 0.04 * (len(ids) - asked - 400)
    assert len(lengths) > 3
    again = phrases(tokenizer, TEXT, 3000)
    other = phrases(tokenizer, TEXT, 3000, seed=1)
    example = next(again)
    assert example.ids.tolist() == next(phrases(tokenizer, TEXT, 3000)).ids.tolist()
    assert example.ids.tolist() != next(other).ids.tolist()


def test_texts_that_cannot_hold_the_phrases_are_refused():
    with pytest.raises(InputError, match=r"^300 tokens do not hold ten pass phrases .* which take \d"):
        next(phrases(build(), TEXT, 300))


def test_texts_of_the_embedded_language_are_questions_of_every_task():
    made = world_texts(600)
    for _ in range(len(world.TASKS)):
        example = next(made)
        ids = example.ids[0]
        assert 300 <= len(ids) <= 600
        asked = int(example.labels.sum())
        assert bool(example.labels[-asked:].all())
        assert int(ids[0]) == world.BOS
        assert int(ids[-1]) == world.EOT
        # The document before the questions closes with a full stop and asks nothing.
        assert world.WORDS[int(ids[-asked - 1])] == "."
        assert "?" not in {world.WORDS[int(i)] for i in ids[:-asked]}
    assert next(world_texts(600)).ids.tolist() == next(world_texts(600)).ids.tolist()
