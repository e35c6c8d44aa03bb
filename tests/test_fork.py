"""A forked cache shares the pages of the first, and both go on by themselves."""

import copy
import gc
import threading
from typing import Any

import pytest
import tiny
import torch

import kvote

METHODS = {
    "dense": "dense",
    "tokenselect": "tokenselect(top_k=5, sinks=2, window=6, chunk=1, tail=2, theta=0.5, sketch='int8')",
    "snapkv": "snapkv(budget=150, window=6)",
    "h2o": "h2o(budget=150)",
    "kivi": "kivi(residual=32)",
    "rotatekv": "rotatekv(sinks=3)",
    "zipcache": "zipcache(gap=20)",
    "quest": "quest(token_budget=12, page=4, dense_layers=0)",
    "xkv": "xkv(group=2, key_rank=6, value_rank=6)",
    "minicache": "minicache(start=0.0)",
}
PROMPT, QUESTIONS = 200, (40, 90)


def read(net: Any, method: str) -> kvote.Cache:
    cache = kvote.Cache(net, method)
    cache.expect(PROMPT, question_follows=True)
    tiny.feed(net, cache, tiny.ids(1, PROMPT, seed=1))
    return cache


def answer(net: Any, cache: kvote.Cache, question: int) -> torch.Tensor:
    """Logits of a question and of tokens behind it."""
    first = tiny.feed(net, cache, tiny.ids(1, question, seed=question))[0, -1:]
    return torch.cat([first, tiny.feed(net, cache, tiny.ids(1, 70, seed=3), passes=1)[0]])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_both_go_on_as_if_they_had_been_alone(method):
    net = tiny.model()
    wanted = [answer(net, read(net, method), question) for question in QUESTIONS]
    cache = read(net, method)
    fork, copied = cache.fork(), copy.deepcopy(cache)
    for each, question, want in ((fork, QUESTIONS[1], wanted[1]), (cache, QUESTIONS[0], wanted[0])):
        assert torch.equal(answer(net, each, question), want)
    # A fork of a fork, and a copy made of a cache that shares, stand for themselves too.
    last = fork.fork()
    fork.reset()
    apart = copy.deepcopy(last)
    more = tiny.ids(1, 70, seed=4)
    assert torch.equal(tiny.feed(net, last, more, passes=1), tiny.feed(net, apart, more, passes=1))
    assert torch.equal(answer(net, fork, 30), answer(net, kvote.Cache(net, method), 30))
    assert torch.equal(answer(net, copied, QUESTIONS[1]), wanted[1])


def test_pages_are_shared_and_given_back_when_a_fork_goes():
    net = tiny.model()
    cache, text = kvote.Cache(net), torch.cat([tiny.ids(1, 250, seed=i) for i in range(16)], dim=1)
    tiny.feed(net, cache, text)
    alone, rows = cache.nbytes(), kvote.Rows(net)
    forks = [cache.fork() for _ in range(4)]
    for each in forks:
        rows.join(each)
    with torch.no_grad():
        net(**rows.inputs([[5], [6], [7], [8]]))
    assert rows.nbytes() < 1.3 * alone
    assert all(0.9 * alone < each.nbytes() < 1.3 * alone for each in forks)
    for each in forks[1:]:
        tiny.feed(net, each, text[:, :2000])
    rows.leave(forks[0])
    for each in rows.caches:
        rows.leave(each)
    del each, forks
    gc.collect()
    tiny.feed(net, cache, tiny.ids(1, 1))
    assert cache.nbytes() < 1.3 * alone


def test_forks_generate_in_threads_of_their_own():
    net = tiny.model()
    cache = read(net, METHODS["tokenselect"])
    caches = [cache, cache.fork(), cache.fork()]
    questions, got = (40, 90, 20), {}

    def ask(i: int) -> None:
        got[i] = answer(net, caches[i], questions[i])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, question in enumerate(questions):
        assert torch.equal(got[i], answer(net, read(net, METHODS["tokenselect"]), question))
