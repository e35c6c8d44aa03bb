"""What stands around documents and questions: a chat template's parts, or nothing."""

import pytest
import tiny
from talking import TEXT, Talks, Words, ids
from transformers import AutoTokenizer

from kvote import Document, InputError
from kvote.models import embedded
from kvote.prompt import Layout, document_ids, layout_of, question_ids


def test_a_chat_template_stands_around_document_and_question():
    layout = layout_of(Talks())
    assert layout == Layout("w99 w101 ", "\n\n", " w103 w102 ", " w103 w101 ", templated=True)
    assert document_ids(Talks(), layout, "w1 w2\n").tolist() == [ids("w99 w101 w1 w2")]
    assert question_ids(Talks(), layout, " w5").tolist() == [ids("w5 w103 w102")]


def test_a_system_message_comes_first():
    assert layout_of(Talks(), system="w7").before == "w99 w100 w7 w103 w101 "


def test_without_a_template_nothing_is_added():
    assert layout_of(Words()) == layout_of(Talks(), raw=True) == Layout()


def test_a_document_ends_without_the_end_that_a_tokenizer_appends():
    assert document_ids(Words(bos=1, eos=2), Layout(), "w1 w2").tolist() == [[1, *ids("w1 w2")]]
    assert document_ids(Words(), Layout(), "w1 w2").tolist() == [ids("w1 w2")]
    # One that is written in the text is part of the text.
    assert document_ids(Words(eos=5), Layout(), "w1 w2").tolist() == [[4, 5]]


def test_an_answer_in_a_template_is_that_of_plain_generate():
    net, talks = tiny.model(), Talks()
    document = Document(net, talks, TEXT, system="w7", tokens_per_pass=64)
    whole = talks.apply_chat_template(
        [{"role": "system", "content": "w7"}, {"role": "user", "content": f"{TEXT}\n\nw1 w2"}]
    )
    tokens = talks(whole).input_ids
    expected = tiny.generate(net, tokens, max_new_tokens=6).sequences[0, tokens.shape[1] :].tolist()
    assert document.ask("w1 w2", max_new_tokens=6).token_ids == expected
    # What the template puts in front is read once, with the document.
    assert len(document) == document.cache.get_seq_length() == len(ids(f"w99 w100 w7 w103 w101 {TEXT}"))
    raw = Document(net, talks, TEXT, raw=True).ask("w1 w2", max_new_tokens=6)
    assert raw.token_ids == Document(net, Words(), TEXT).ask("w1 w2", max_new_tokens=6).token_ids != expected


def test_templates_of_transformers_are_taken_apart():
    tokenizer = AutoTokenizer.from_pretrained(embedded())
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert layout_of(tokenizer) == Layout("<user>", "\n\n", "</s>\n<assistant>", "</s>\n<user>", templated=True)


@pytest.mark.parametrize(
    ("template", "system", "says"),
    [
        ("{{ raise_exception('no system here') }}", "Be brief.", "a system message is among them.: no system here"),
        ("{{ raise_exception('not this') }}", None, "does not take these messages: not this"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", None, "does not keep a message as it is"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", None, "does not keep a message as it is"),
        ("{% for %}", None, "does not take these messages"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(template, system, says):
    tokenizer = AutoTokenizer.from_pretrained(embedded())
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=says):
        layout_of(tokenizer, system=system)


@pytest.mark.parametrize("raw", [False, True])
def test_a_system_message_without_a_place_is_refused(raw):
    with pytest.raises(InputError, match=r"A system message has no place: (raw=True|this tokenizer)"):
        layout_of(Talks() if raw else Words(), system="w7", raw=raw)
    with pytest.raises(InputError, match="A system message is a text; got a int"):
        layout_of(Talks(), system=7)
