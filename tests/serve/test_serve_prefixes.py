"""Prompts that begin alike are read once, and answered as if they had been read each."""

import httpx
import pytest

from kvote import Library
from kvote.models import world
from kvote.saving import identity
from kvote.serve.engine import Limits
from kvote.serve.prefixes import Prefixes

CHUNK = 128


@pytest.fixture
def sharing(start, parts):
    """Starts servers that hold what they read."""

    def one(library: Library, *, shares: bool = False, **options):
        kept = Prefixes(parts[0], library, chunk=CHUNK, shares=shares)
        return start(limits=Limits(chunk=CHUNK), prefixes=kept, **options)

    return one


def asked(server, text: str, method: str = "dense", key: str = "anything"):
    made = server.client(key).completions.create(
        model="embedded", prompt=text, temperature=0, max_tokens=12, extra_body={"kv_method": method}
    )
    return made.choices[0].text, made.usage.kv["prefix_tokens_reused"], made.usage.prompt_tokens


def texts() -> tuple[str, str]:
    """Two that begin alike: some 600 tokens, and a question each."""
    document = world.sample("needle", 600, 3, 4).document
    return f"{document} {question(3)}", f"{document} {question(4)}"


def question(seed: int) -> str:
    return world.sample("needle", 600, seed, 4).questions[0].prompt


@pytest.mark.parametrize(
    ("method", "least", "most"),
    [
        ("dense", 500, 620),
        ("tokenselect(top_k=64, sinks=4, window=128, chunk=64)", 300, 600),
        # What is kept of a beginning depends on what follows.
        ("snapkv(budget=0.5)", 0, 0),
        ("kivi(bits=4)", 0, 0),
    ],
)
def test_a_later_prompt_is_answered_as_if_it_had_been_read_whole(server, sharing, method, least, most):
    first, second = texts()
    own = sharing(Library())
    assert asked(own, first, method)[1] == 0
    got, reused, _ = asked(own, second, method)
    assert least <= reused <= most
    assert got == asked(server, second, method)[0]


def test_the_same_prompt_again_reads_its_last_token_alone(sharing):
    own, text = sharing(Library()), texts()[0]
    once, again = asked(own, text), asked(own, text)
    assert again[0] == once[0]
    assert again[1] == again[2] - 1


def test_a_prompt_that_was_read_in_parts_is_worth_what_all_of_it_takes(sharing):
    library = Library()
    own, text = sharing(library), texts()[0]
    asked(own, text)
    (once,) = (prefix.seconds for prefix in library._held)
    asked(own, text)
    (again,) = (prefix.seconds for prefix in library._held)
    assert again > 0.9 * once


def test_a_conversation_goes_on_behind_what_was_read(server, sharing):
    own = sharing(Library())
    messages = [{"role": "user", "content": texts()[0]}]
    told = []
    for each in (own, server):
        talk = list(messages)
        for seed in (5, 6):
            made = each.client().chat.completions.create(model="embedded", messages=talk, temperature=0, max_tokens=6)
            talk += [
                {"role": "assistant", "content": made.choices[0].message.content},
                {"role": "user", "content": question(seed)},
            ]
        told.append((made.choices[0].message.content, made.usage.prompt_tokens_details.cached_tokens))
    assert told[0][0] == told[1][0]
    assert told[0][1] > 500
    assert told[1][1] == 0


def test_another_key_finds_nothing_unless_the_server_shares(sharing):
    keys = ["first-key-of-two", "second-key-of-two"]
    first, second = texts()
    apart, together = sharing(Library(), keys=keys), sharing(Library(), keys=keys, shares=True)
    for server, shared in ((apart, False), (together, True)):
        asked(server, first, key=keys[0])
        assert (asked(server, second, key=keys[1])[1] > 0) is shared
        assert asked(server, second, key=keys[0])[1] > 0


def test_a_library_in_a_folder_serves_the_next_server(sharing, tmp_path):
    first, second = texts()
    with Library(tmp_path) as library:
        asked(sharing(library), first)
    with Library(tmp_path) as library:
        assert asked(sharing(library), second)[1] > 500


def test_weights_are_looked_at_once_for_all_methods(sharing, monkeypatch):
    looked, found = [], identity.of_weights
    monkeypatch.setattr(identity, "of_weights", lambda model: looked.append(model) or found(model))
    own = sharing(Library())
    for method in ("dense", "tokenselect(top_k=64, sinks=4, window=128)"):
        asked(own, texts()[0], method)
    assert len(looked) == 1


def test_memory_is_bounded(sharing):
    library = Library(memory=2**20)
    own = sharing(library)
    for seed in range(4):
        asked(own, world.sample("needle", 300, seed, 4).document)
    assert library.statistics.nbytes <= 2**20
    assert library.statistics.dropped > 0


def test_a_document_that_is_sent_again_is_not_read_again(sharing):
    library = Library()
    own = sharing(library)
    text = world.sample("needle", 600, 8, 4).document
    for _ in range(2):
        reply = httpx.post(f"{own.url}/v1/documents", json={"text": text}, timeout=60)
        assert reply.status_code == 200
    assert library.statistics.tokens_reused > 500
