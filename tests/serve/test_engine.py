"""Requests join and leave a running batch, and none changes what another is answered."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from kvote.models import world
from kvote.serve.engine import Limits

METHODS = ("dense", "tokenselect(top_k=64)", "streamingllm(sinks=4, window=200)", "kivi(bits=4)")


def complete(server, text, method, tokens=20, **options):
    return server.client().completions.create(
        model="embedded",
        prompt=text,
        temperature=0,
        max_tokens=tokens,
        extra_body={"kv_method": method},
        **options,
    )


def test_neighbours_do_not_change_an_answer(server):
    texts = [world.sample("needle", 150 + 90 * i, i, 4).document for i in range(8)]
    asked = [(text, METHODS[i % 4], 12 + i) for i, text in enumerate(texts)]
    alone = [complete(server, *one).choices[0].text for one in asked]
    with ThreadPoolExecutor(8) as pool:
        together = [made.choices[0].text for made in pool.map(lambda one: complete(server, *one), asked)]
    assert together == alone


def test_rows_of_unlike_methods_share_a_pass(server):
    engine = server.service.engine
    steps, generated = engine.steps, engine.generated
    texts = [world.sample("needle", 200, i, 4).document for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: complete(server, texts[i], METHODS[i], 40), range(4)))
    assert engine.steps - steps < 0.7 * (engine.generated - generated)


def test_a_client_that_leaves_frees_its_place(server):
    service = server.service
    stream = complete(server, "The the", "dense", 4_000, stream=True)
    next(iter(stream))
    assert len(service.engine._rows) == 1
    stream.close()
    _wait(lambda: not service.engine._rows and not service.engine._batch.caches)


def test_a_client_that_leaves_before_its_answer_frees_its_place(server):
    with pytest.raises(openai.APITimeoutError):
        complete(server, "The the", "dense", 4_000, timeout=0.5)
    _wait(lambda: not server.service.engine._rows)


def test_a_full_queue_is_told_with_when_to_come_again(start):
    server = start(limits=Limits(rows=1, queue=1, context=20_000))
    streams = [complete(server, "The the", "dense", 10_000, stream=True)]
    next(iter(streams[0]))
    waiting = threading.Thread(target=lambda: complete(server, "The the", "dense", 1))
    waiting.start()
    _wait(lambda: len(server.service.engine._waiting) == 1)
    reply = httpx.post(f"{server.url}/v1/completions", json={"model": "embedded", "prompt": "The the"})
    assert reply.status_code == 429
    assert reply.headers["Retry-After"]
    streams[0].close()
    waiting.join()


def test_what_never_fits_is_refused_and_what_fits_later_waits(start):
    small = start(limits=Limits(nbytes=2**23))
    with pytest.raises(openai.BadRequestError, match="bytes at the peak"):
        complete(small, "The the", "dense", 20_000)
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda _: complete(small, "The the", "dense", 400), range(6)))
    assert all(one.usage.completion_tokens == 400 for one in made)


@pytest.mark.slow
def test_two_hundred_clients_of_which_a_quarter_leave(server):
    texts = [world.sample("needle", 60 + 20 * (i % 9), i, 2).document for i in range(9)]
    right = [complete(server, text, METHODS[i % 4], 10).choices[0].text for i, text in enumerate(texts)]

    def one(i):
        if i % 4 == 3:
            stream = complete(server, texts[i % 9], METHODS[i % 9 % 4], 500, stream=True)
            next(iter(stream))
            stream.close()
            return True
        return complete(server, texts[i % 9], METHODS[i % 9 % 4], 10).choices[0].text == right[i % 9]

    with ThreadPoolExecutor(200) as pool:
        assert all(pool.map(one, range(200)))
    engine = server.service.engine
    _wait(lambda: not (engine._rows or engine._reading or engine._waiting or engine._batch.caches))


def _wait(until, seconds=30):
    end = time.time() + seconds
    while not until():
        assert time.time() < end
        time.sleep(0.01)
