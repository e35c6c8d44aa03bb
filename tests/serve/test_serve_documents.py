"""Documents: read once, asked often, seen by their owner alone."""

import httpx
import openai
import pytest

from kvote.models import world
from kvote.serve.documents import Documents

SAMPLE = world.sample("needle", 600, 9, 4)
KEYS = ("first-secret", "second-secret")


@pytest.fixture(scope="module")
def guarded(start):
    return start(keys=KEYS)


def post(server, key, **body):
    return httpx.post(f"{server.url}/v1/documents", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def ask(server, key, document, question):
    return server.client(key).chat.completions.create(
        model="embedded",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=6,
        extra_body={"document": document},
    )


@pytest.mark.parametrize("method", ["dense", "tokenselect(top_k=64)", "snapkv(budget=0.5) | kivi(bits=4)"])
def test_a_document_is_read_once_and_asked_twice_with_the_same_answer(guarded, method):
    made = post(guarded, KEYS[0], text=SAMPLE.document, kv_method=method).json()
    assert made["tokens"] >= 600
    assert made["kv_method"] == method
    question = SAMPLE.questions[0].prompt
    first, second = (ask(guarded, KEYS[0], made["id"], question) for _ in range(2))
    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.usage.kv["prefix_tokens_reused"] == made["tokens"]


def test_a_document_is_not_seen_with_another_key(guarded):
    made = post(guarded, KEYS[0], text=SAMPLE.document).json()
    with pytest.raises(openai.BadRequestError, match="no document"):
        ask(guarded, KEYS[1], made["id"], "What?")
    others = httpx.get(f"{guarded.url}/v1/documents", headers={"Authorization": f"Bearer {KEYS[1]}"}).json()
    assert made["id"] not in [one["id"] for one in others["data"]]


def test_no_key_or_a_wrong_one_opens_nothing(guarded):
    assert post(guarded, "wrong-secret", text="The the").status_code == 401
    assert httpx.get(f"{guarded.url}/v1/models").status_code == 401
    assert httpx.get(f"{guarded.url}/health").status_code == 200


def test_a_file_can_be_uploaded_and_forgotten(guarded):
    own = {"Authorization": f"Bearer {KEYS[0]}"}
    files = {"file": ("story.txt", SAMPLE.document.encode())}
    made = httpx.post(f"{guarded.url}/v1/documents/upload", files=files, headers=own, timeout=60).json()
    assert made["name"] == "story.txt"
    assert httpx.delete(f"{guarded.url}/v1/documents/{made['id']}", headers=own).json()["deleted"] is True
    assert httpx.get(f"{guarded.url}/v1/documents/{made['id']}", headers=own).status_code == 404


def test_documents_asked_longest_ago_go_first(start):
    server = start(documents=Documents(2**28, 2))
    made = [post(server, "any", text=f"The the {word}").json()["id"] for word in ("a", "b", "c")]
    held = [one["id"] for one in httpx.get(f"{server.url}/v1/documents").json()["data"]]
    assert held == made[1:]


def test_other_hosts_and_origins_and_large_bodies_are_refused(start):
    server = start(largest_body=10_000)
    url = f"{server.url}/v1/models"
    assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 403
    assert httpx.get(url, headers={"Origin": "http://evil.example"}).status_code == 403
    assert post(server, "any", text="a " * 10_000).status_code == 413
