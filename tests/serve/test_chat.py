"""OpenAI's own client against the server."""

import httpx
import openai
import pytest
import torch

import kvote
from kvote.models import world

SAMPLE = world.sample("needle", 500, 3, 4)
ASKED = SAMPLE.questions[0]
CHAT = {"model": "embedded", "temperature": 0, "max_tokens": 6}


def ask(client, text=SAMPLE.document + " " + ASKED.prompt, **options):
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **{**CHAT, **options})


def test_a_question_is_answered_and_its_cost_is_told(server):
    answer = ask(server.client(), extra_body={"kv_method": "tokenselect(top_k=64, sinks=16, window=64)"})
    assert answer.choices[0].message.content == ASKED.answer
    assert answer.choices[0].finish_reason == "stop"
    kv = answer.usage.kv
    assert kv["method"] == "tokenselect(top_k=64, sinks=16, window=64)"
    assert kv["tokens_seen"] == answer.usage.prompt_tokens + answer.usage.completion_tokens - 1
    assert kv["bytes_held"] >= 4 * 2 * 2 * 32 * 4 * kv["tokens_held"]
    assert kv["tokens_read_per_step"] < kv["tokens_held"]


def test_the_tokens_are_those_of_generate(server, parts):
    model, tokenizer = parts
    text = world.sample("needle", 700, 5, 4).document
    told = server.client().completions.create(model="embedded", prompt=text, temperature=0, max_tokens=24)
    ids = tokenizer(text, return_tensors="pt").input_ids
    cache = kvote.Cache(model, "dense")
    made = model.generate(ids, past_key_values=cache, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert told.choices[0].text == tokenizer.decode(made, skip_special_tokens=True)


def test_a_stream_says_what_the_whole_answer_says(server):
    events = list(ask(server.client(), stream=True, stream_options={"include_usage": True}))
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == ASKED.answer
    assert events[-1].usage.kv["method"] == "dense"
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] == "stop"


def test_several_choices_come_from_one_reading_of_the_prompt(server):
    client = server.client()
    before = server.service.metrics.registry.get_sample_value("kvote_prompt_tokens_total")
    answer = ask(client, n=3, temperature=1.0, seed=7, max_tokens=8)
    read = server.service.metrics.registry.get_sample_value("kvote_prompt_tokens_total") - before
    assert read == answer.usage.prompt_tokens
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    again = ask(client, n=3, temperature=1.0, seed=7, max_tokens=8)
    assert [c.message.content for c in again.choices] == [c.message.content for c in answer.choices]


def test_stop_strings_end_an_answer_and_are_not_part_of_it(server):
    free = server.client().completions.create(model="embedded", prompt="The the", temperature=0, max_tokens=12)
    words = free.choices[0].text.split()
    stop = words[3]
    kept = free.choices[0].text[: free.choices[0].text.index(stop)]
    for stream in (False, True):
        given = server.client().completions.create(
            model="embedded", prompt="The the", temperature=0, max_tokens=12, stop=[stop], stream=stream
        )
        text = "".join(event.choices[0].text for event in given) if stream else given.choices[0].text
        assert text == kept


def test_logprobs_are_those_of_the_model(server, parts):
    model, tokenizer = parts
    answer = server.client().completions.create(
        model="embedded", prompt="The the", max_tokens=1, temperature=0, logprobs=3
    )
    told = answer.choices[0].logprobs
    ids = tokenizer("The the", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].float().log_softmax(-1).topk(3)
    assert told.token_logprobs[0] == pytest.approx(float(best.values[0]), abs=1e-4)
    assert sorted(told.top_logprobs[0].values(), reverse=True) == pytest.approx(best.values.tolist(), abs=1e-4)


def test_penalties_and_biases_change_what_is_chosen(server, parts):
    _, tokenizer = parts
    create = server.client().completions.create
    free = create(model="embedded", prompt="The the", max_tokens=1, temperature=0).choices[0].text
    token = tokenizer(free, add_special_tokens=False).input_ids[0]
    banned = create(model="embedded", prompt="The the", max_tokens=1, temperature=0, logit_bias={str(token): -100})
    assert banned.choices[0].text != free


def test_the_responses_interface_answers_and_streams(server):
    client = server.client()
    text = SAMPLE.document + " " + ASKED.prompt
    told = client.responses.create(model="embedded", input=text, temperature=0, max_output_tokens=6)
    assert told.output_text == ASKED.answer
    assert told.status == "completed"
    events = list(
        client.responses.create(model="embedded", input=text, temperature=0, max_output_tokens=6, stream=True)
    )
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == ASKED.answer
    assert events[-1].type == "response.completed"


@pytest.mark.parametrize(
    ("extra", "about"),
    [
        ({"kv_method": "nonsense"}, "no method 'nonsense'"),
        ({"kv_method": "tokenselect(top_k=-1)"}, "top_k"),
        ({"kv_method": "doublesparsity(channels='/etc/passwd')"}, "cannot be named here"),
        ({"kv_method": "dense | offload(folder='/var/tmp')"}, "writes to the disk of the server"),
        ({"document": "doc-none"}, "no document"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"never_heard_of": 1}, "never_heard_of"),
        ({"max_tokens": 10**6}, "more than"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 3}, "logprobs"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_reason(server, extra, about):
    with pytest.raises(openai.BadRequestError, match=about):
        ask(server.client(), "The the", extra_body=extra)


def test_another_model_is_not_found(server):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        ask(server.client(), model="gpt")


def test_errors_have_openais_shape_everywhere(server):
    for method, path, body in (
        ("POST", "/v1/chat/completions", b"{"),
        ("GET", "/v1/nothing", None),
        ("DELETE", "/v1/models", None),
    ):
        reply = httpx.request(method, server.url + path, content=body)
        assert 400 <= reply.status_code < 500
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
