"""A conversation keeps its turns in the cache, with every method."""

import pytest
import tiny
import torch
from talking import TEXT, Talks, Words, ids

from kvote import Conversation, Document, InputError


def told(net, tokens, count):
    tokens = torch.tensor([tokens])
    return tiny.generate(net, tokens, max_new_tokens=count).sequences[0, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("tokens_per_pass", [4096, 3])
def test_turns_in_a_template_are_those_of_plain_generate(tokens_per_pass):
    net = tiny.model()
    talk = Conversation(net, Talks(), system="w7", tokens_per_pass=tokens_per_pass)
    held = ids("w99 w100 w7 w103 w101 w1 w2 w103 w102")
    messages = ("w1 w2", "w5 w6", "w8")
    for i, message in enumerate(messages):
        held += ids(f"w103 w101 {message} w103 w102") if i else []
        answer = talk.say(message, max_new_tokens=5)
        assert answer.token_ids == told(net, held, 5)
        held += answer.token_ids
        assert talk.token_ids.tolist() == [held]
    # The last token is fed with the next turn.
    assert talk.cache.get_seq_length() == len(held) - 1
    assert [turn.said for turn in talk.turns] == list(messages)


def test_an_end_of_sequence_is_not_left_in_the_middle():
    net = tiny.model()
    first = told(net, ids("w1 w2"), 8)
    talk = Conversation(net, Words())
    answer = talk.say("w1 w2", max_new_tokens=8, eos_token_id=first[3])
    end = first.index(first[3])
    assert answer.token_ids == first[: end + 1]
    assert talk.token_ids.tolist() == [ids("w1 w2") + first[:end]]
    assert talk.say("w5", max_new_tokens=4).token_ids == told(net, ids("w1 w2") + first[:end] + ids("w5"), 4)


@pytest.mark.parametrize("spec", ["dense", "snapkv(budget=40, window=6)", "kivi(residual=32)"])
def test_a_conversation_about_a_document_leaves_the_document_alone(spec):
    document = Document(tiny.model(), Talks(), TEXT, spec)
    expected = document.ask("w1 w2", max_new_tokens=6).token_ids
    talk = document.chat()
    assert talk.say("w1 w2", max_new_tokens=6).token_ids == expected
    assert len(talk.say("w3", max_new_tokens=6).token_ids) == 6
    assert document.cache.get_seq_length() == len(document)
    assert document.ask("w1 w2", max_new_tokens=6).token_ids == expected


def test_methods_that_compress_go_on_compressing():
    talk = Document(tiny.model(), Talks(), TEXT, "snapkv(budget=40, window=6)").chat()
    for turn in range(4):
        talk.say(" ".join(f"w{i + turn}" for i in range(30)), max_new_tokens=4)
        # What is generated after a prompt comes on top, until the next prompt ends.
        assert max(len(lane) for lane in talk.cache.positions(0)[0]) <= 40 + 4
    assert len(talk) > 270


@pytest.mark.parametrize("spec", ["dense", "h2o(budget=40)"])
def test_a_turn_that_fails_leaves_the_conversation_as_it_was(spec):
    net = tiny.model()
    talk, other = (Document(net, Talks(), TEXT, spec).chat() for _ in range(2))
    for each in (talk, other):
        each.say("w1 w2", max_new_tokens=5)
    calls = []

    def breaks(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = net.model.layers[1].register_forward_pre_hook(breaks)
    with pytest.raises(KeyboardInterrupt):
        talk.say("w40 w41 w42", max_new_tokens=9)
    handle.remove()
    assert len(talk.turns) == 1
    assert talk.say("w5", max_new_tokens=6).token_ids == other.say("w5", max_new_tokens=6).token_ids


def test_a_streamed_turn_that_is_closed_ends_with_what_was_said():
    net = tiny.model()
    talk = Conversation(net, Talks())
    with talk.stream("w1 w2", max_new_tokens=5000) as stream:
        next(stream)
    said = stream.answer.token_ids
    assert 0 < len(said) < 5000
    held = ids("w99 w101 w1 w2 w103 w102") + said + ids("w103 w101 w5 w103 w102")
    assert talk.say("w5", max_new_tokens=4).token_ids == told(net, held, 4)


def test_what_makes_no_sense_is_refused():
    talk = Conversation(tiny.model(), Words())
    with pytest.raises(InputError, match="leave num_beams out"):
        talk.say("w1", num_beams=3)
    with pytest.raises(InputError, match="question is empty"):
        talk.say("")
