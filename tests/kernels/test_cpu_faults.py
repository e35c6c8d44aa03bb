"""The comparisons can fail: one fault at a time is put between the tests and a kernel, and each must be noticed."""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from examples import NAMES, SMALL, examples
from paged import compiled
from torch import Tensor

from kvote.kernels import cpu
from kvote.kernels.lanes import Lanes

pytestmark = compiled
Call = dict[str, Any]


def heads_permuted(call: Call) -> None:
    """Query head i * h + h_kv where h_kv * g + i is meant."""
    query: Tensor = call["query"]
    at = 0 if query.dim() == 3 and "limits" in call else 1
    order = torch.arange(query.shape[at]).reshape(SMALL.groups, SMALL.heads).t().flatten()
    call["query"] = query.index_select(at, order)


def one_place_later(call: Call) -> None:
    if "angles" in call:
        call["angles"] = tuple(a.roll(1, dims=-2) for a in call["angles"])
    else:
        call["positions"] = call["positions"] + 1


def one_token_fewer(call: Call) -> None:
    """A length from before the last token came."""
    if "first" in call:
        call["first"] = [max(1, first) - 1 for first in call["first"]]
    elif "limits" in call:
        call["limits"] = [call["limits"][0] - 1, *call["limits"][1:]]
    elif isinstance(call["tokens"], range):
        call["tokens"] = call["tokens"][:-1]
    else:
        call["tokens"] = torch.cat([call["tokens"][:, :-1], call["tokens"][:, -2:-1]], dim=1)


def keys_of_a_page_lost(call: Call) -> None:
    call["keys"] = call["keys"].clone()
    call["keys"][call["lanes"].runs[0, 0]] = 0


def values_of_a_page_lost(call: Call) -> None:
    call["values"] = call["values"].clone()
    call["values"][call["lanes"].runs[0, 0]] = 0


def page_table(call: Call) -> list[list[tuple[int, int]]]:
    runs = [(int(first), int(count)) for first, count in call["lanes"].runs]
    return [runs[i:j] for i, j in pairwise(call["lanes"].begins)]


def pages_swapped(call: Call) -> None:
    """Two entries of the first lane's page table have changed places."""
    lanes = page_table(call)
    lanes[0][:2] = lanes[0][1::-1]
    call["lanes"] = Lanes(lanes)


def lanes_swapped(call: Call) -> None:
    call["lanes"] = Lanes(page_table(call)[::-1])


def stale_sketch_of_a_token(call: Call) -> None:
    """One token's sketch is that of the key that lay in its slot before."""
    keys, slot = call["keys"].clone(), int(call["lanes"].pages()[0][1]) * 64 + 10
    keys.view(-1, keys.shape[-1])[slot] *= -1
    call["sketch"] = call["sketch"].clone()
    cpu.sketch(keys, call["sketch"], call["bits"], call["lanes"].only(0), 74, 75)


def a_token_not_sketched(call: Call) -> None:
    call["start"] += 1


def about_another_centre(call: Call) -> None:
    """As if a key of the first page were another."""
    keys = call["keys"] = call["keys"].clone()
    keys[int(call["lanes"].pages()[0][0]), 5] += 3
    if call["stop"] > 64:
        call["start"] = 64


def not_sketched(call: Call) -> None:
    call["sketch"] = None


def fewer_bits(call: Call) -> None:
    call["bits"] = 4


def a_vote_lost(call: Call) -> None:
    votes: Tensor = call["votes"].clone()
    call["votes"] = votes.scatter(-1, votes.argmax(-1, keepdim=True), float("-inf"))


def pairs_mistaken(call: Call) -> None:
    call["interleaved"] = not call["interleaved"]


def cap_forgotten(call: Call) -> None:
    call["softcap"] = None


def scale_forgotten(call: Call) -> None:
    call["scale"] = 1.0


def not_nominated(call: Call) -> None:
    call["nominate"] = 0


# Fault, the kernel whose arguments it changes, and the comparisons that must notice.
FAULTS: list[tuple[Callable[[Call], None], str, list[str]]] = [
    (heads_permuted, "votes", ["votes", "votes of 8 bits", "votes of 4 bits"]),
    (heads_permuted, "select", ["select", "select by 8 bits", "nominate by 4 bits"]),
    (heads_permuted, "decode", ["decode", "decode turned", "decode capped"]),
    (heads_permuted, "attention_mass", ["mass", "mass capped"]),
    (heads_permuted, "scores", ["scores"]),
    (heads_permuted, "label_scores", ["label scores"]),
    (one_place_later, "decode", ["decode turned", "decode capped"]),
    (one_place_later, "gather", ["gather", "gather interleaved"]),
    (one_place_later, "rotate", ["turn", "turn strided"]),
    (one_place_later, "append", ["append", "append and sketch"]),
    (one_token_fewer, "votes", ["votes", "votes of 8 bits", "votes of 4 bits"]),
    (one_token_fewer, "decode", ["decode", "decode turned", "decode capped"]),
    (one_token_fewer, "attention_mass", ["mass", "mass capped"]),
    (one_token_fewer, "append", ["append", "append and sketch"]),
    (keys_of_a_page_lost, "votes", ["votes"]),
    (keys_of_a_page_lost, "select", ["select", "nominate by 4 bits"]),
    (keys_of_a_page_lost, "decode", ["decode", "decode turned", "decode capped"]),
    (keys_of_a_page_lost, "gather", ["gather", "gather interleaved"]),
    (keys_of_a_page_lost, "attention_mass", ["mass", "mass capped"]),
    (keys_of_a_page_lost, "scores", ["scores"]),
    (values_of_a_page_lost, "decode", ["decode", "decode turned", "decode capped"]),
    (values_of_a_page_lost, "gather", ["gather", "gather interleaved"]),
    (pages_swapped, "votes", ["votes", "votes of 8 bits", "votes of 4 bits"]),
    (pages_swapped, "select", ["select", "select by 8 bits", "nominate by 4 bits"]),
    (pages_swapped, "decode", ["decode turned", "decode capped"]),
    (pages_swapped, "gather", ["gather", "gather interleaved"]),
    (pages_swapped, "attention_mass", ["mass", "mass capped"]),
    (pages_swapped, "scores", ["scores"]),
    (pages_swapped, "label_scores", ["label scores"]),
    (pages_swapped, "append", ["append", "append and sketch"]),
    (lanes_swapped, "decode", ["decode", "decode turned", "decode capped"]),
    (lanes_swapped, "attention_mass", ["mass", "mass capped"]),
    (lanes_swapped, "scores", ["scores"]),
    (lanes_swapped, "label_scores", ["label scores"]),
    (lanes_swapped, "append", ["append", "append and sketch"]),
    (stale_sketch_of_a_token, "votes", ["votes of 8 bits", "votes of 4 bits"]),
    (not_sketched, "votes", ["votes of 8 bits", "votes of 4 bits"]),
    (not_sketched, "append", ["append and sketch"]),
    (a_token_not_sketched, "sketch", ["sketch of 8 bits", "sketch of 4 bits"]),
    (about_another_centre, "sketch", ["sketch of 8 bits", "sketch of 4 bits"]),
    (fewer_bits, "append", ["append and sketch"]),
    (a_vote_lost, "top_k", ["top_k"]),
    (pairs_mistaken, "decode", ["decode turned", "decode capped"]),
    (pairs_mistaken, "gather", ["gather", "gather interleaved"]),
    (pairs_mistaken, "rotate", ["turn", "turn strided"]),
    (cap_forgotten, "decode", ["decode capped"]),
    (cap_forgotten, "attention_mass", ["mass capped"]),
    (scale_forgotten, "decode", ["decode", "decode turned", "decode capped"]),
    (scale_forgotten, "attention_mass", ["mass", "mass capped"]),
    (not_nominated, "select", ["nominate by 4 bits"]),
]
EACH = [(fault, kernel, name) for fault, kernel, names in FAULTS for name in names]


@pytest.mark.parametrize(("fault", "kernel", "name"), EACH, ids=[f"{f.__name__}-{name}" for f, _, name in EACH])
def test_a_fault_is_noticed(monkeypatch, fault, kernel, name):
    honest = getattr(cpu, kernel)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(honest).bind(*args, **kwargs)
        fault(call.arguments)
        return honest(*call.args, **call.kwargs)

    monkeypatch.setattr(cpu, kernel, faulty)
    with pytest.raises(AssertionError):
        examples(SMALL)[name]()


@pytest.mark.parametrize("name", NAMES)
def test_without_a_fault_nothing_is_noticed(name):
    examples(SMALL)[name]()


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_is_not_written_is_noticed(monkeypatch, name):
    names = "votes select top_k decode attention_mass scores label_scores turn gather append sketch"
    for kernel in names.split():
        monkeypatch.setattr(cpu._cpu, kernel, lambda *args: None)
    with pytest.raises(AssertionError):
        examples(SMALL)[name]()
