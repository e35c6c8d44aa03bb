"""Votes on packed tokens and lists of them, with those behind them that are not packed: the law, and the kernels."""

from dataclasses import replace
from typing import Any

import mixed_tokens as m
import packs as p
import pytest
import torch
from comparisons import same_bits
from examples import SETS, instruction_set, threads
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_tokens import Mixed
from paged import DTYPES, Case, compiled

from kvote.kernels import cpu, law, reference
from kvote.kernels.lanes import Lanes

given_cases = settings(max_examples=25, deadline=None)


@st.composite
def mixed(draw: Any) -> Mixed:
    pack = draw(p.pack_cases())
    return Mixed(replace(pack, kind=draw(st.sampled_from(["plain", "constant"]))), draw(st.integers(0, 200)))


@compiled
@given_cases
@given(mixed(), st.integers(1, 3), st.data())
def test_votes_equal_the_law(case, rows, data):
    start = data.draw(st.integers(0, case.n - 1))
    limits = [data.draw(st.integers(start + 1, case.n)) for _ in range(rows)]
    m.votes_equal_the_law(case, start, limits)
    m.winners_win_the_vote(case, start, limits, data.draw(st.integers(1, min(limits) - start)))


@compiled
@given_cases
@given(mixed(), st.sampled_from([None, 2.0]), st.booleans(), st.data())
def test_a_list_equals_the_law(case, softcap, interleaved, data):
    pairs = data.draw(st.integers(0, case.pack.case.d // 2))
    m.list_equals_the_law(case, data.draw(st.integers(1, case.n)), pairs, interleaved, softcap)


SHAPES = [
    Mixed(p.PackCase(Case(n=333, sequences=2, groups=g, d=d, dtype=t, seed=d), bits, group, by_token=by_token), 70)
    for d, g, bits, group, by_token in (
        (32, 1, 2, 32, False),
        (80, 7, 4, 64, True),
        (96, 2, 2, 128, False),
        (128, 4, 2, 32, False),
        (256, 8, 8, 32, False),
    )
    for t in DTYPES
]


@compiled
@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set_equals_the_law(isa):
    with instruction_set(isa):
        for case in SHAPES:
            m.votes_equal_the_law(case, 5, [390, 331])
            m.votes_equal_the_law(case, 360, [case.n])
            m.list_equals_the_law(case, 150, 8, True, None)
            m.list_equals_the_law(case, 99, case.pack.case.d // 2, False, 3.0)


@compiled
@pytest.mark.parametrize("case", SHAPES[3:11:7], ids=str)
def test_any_number_of_threads_gives_the_same_bits(case):
    case = replace(case, pack=replace(case.pack, case=replace(case.pack.case, n=2300, sequences=1)))
    calls = [
        lambda: m.votes_equal_the_law(case, 5, [2250]),
        lambda: m.winners_win_the_vote(case, 5, [2250], 300),
        lambda: m.list_equals_the_law(case, 900, 16, False, None),
    ]
    for call in calls:
        alone = call()
        for count in (2, 3):
            with threads(count):
                together = call()
            assert all(same_bits(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("ends", ["alike", "apart"])
def test_the_law_reads_tokens_where_they_lie(ends):
    """Packed tokens as they decode and raw ones, side by side, are what votes and lists are about."""
    case = Mixed(p.PackCase(Case(n=200, sequences=2, heads=2, groups=3), bits=4), 50, apart=ends == "apart")
    held = m.MixedTokens(case)
    key, value = held.key, held.value
    query = held.raw.query(2)
    votes = law.packed.votes(query, held.keys, held.tail, 3, [200, 240])
    expected = reference.votes_within(reference.scores(query, key[:, :, 3:240]), 3, [200, 240])
    torch.testing.assert_close(votes, expected)
    won = law.packed.select(query, held.keys, held.tail, 3, [200, 240], 9)
    assert torch.equal(won, reference.top_k(reference.forbid(expected, 3, [200, 240]), 9) + 3)
    tokens, angles = held.some_tokens(60), held.raw.angles(60, pairs=8)
    rule: dict[str, Any] = {"scale": 0.2, "softcap": None}
    got = law.packed.decode(
        query[:, :, 0], held.keys, held.values, held.tail, tokens, angles=angles, interleaved=True, **rule
    )
    at = tokens[:, None, :, None].expand(-1, 2, -1, key.shape[-1])
    rotated = reference.rotate(key.gather(2, at), *angles, interleaved=True)
    wanted = reference.attend(query[:, :, :1], rotated, value.gather(2, at), **rule)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs[:, :, 0])


@compiled
@pytest.mark.parametrize("fault", ["packed", "first", "lanes"])
def test_the_comparison_notices_tokens_read_elsewhere(fault, monkeypatch):
    case, whole = Mixed(p.PackCase(Case(n=300, d=64, seed=5)), 70), m.MixedTokens.tail

    def spoiled(self):
        tail = whole.fget(self)
        if fault == "lanes":
            return tail._replace(lanes=Lanes(list(reversed(self.raw.runs))))
        return tail._replace(**{fault: [n - 1 for n in getattr(tail, fault)]})

    monkeypatch.setattr(m.MixedTokens, "tail", property(spoiled))
    with pytest.raises(AssertionError):
        m.votes_equal_the_law(case, 5, [350])
    with pytest.raises(AssertionError):
        m.list_equals_the_law(case, 300, 8, False, None)


def refusals(backend: Any) -> dict[str, Any]:
    held = m.MixedTokens(Mixed(p.PackCase(Case(n=64)), 30))
    query, tokens, rule = torch.zeros(1, 4, 1, 32), held.some_tokens(5), {"scale": 1.0, "softcap": None}
    tail, given = held.tail, {"angles": None, "interleaved": False}

    def vote(tail=tail, keys=held.keys, query=query, limits=(20,)):
        return lambda: backend.packed.votes(query, keys, tail, 0, list(limits))

    def read(tail=tail, tokens=tokens, keys=held.keys, **more):
        args = {**given, **rule, **more}
        return lambda: backend.packed.decode(query[:, :, 0], keys, held.values, tail, tokens, **args)

    return {
        "end of what is packed": vote(tail._replace(packed=[64, 64])),
        "no token may lie between": vote(tail._replace(first=[65])),
        "of as many lanes": vote(tail._replace(lanes=Lanes(held.raw.runs[:1]))),
        "dtype of the form": read(tail._replace(keys=tail.keys.half(), values=tail.values.half())),
        "keys must be keys of": vote(keys=held.values),
        "one limit per query row": vote(limits=(20, 30)),
        "keys must be keys and": read(keys=held.values),
        "contiguous int64": read(tokens=tokens.int()),
        "one list per sequence": read(tokens=tokens.repeat(2, 1)),
        "angles must fit": read(angles=held.raw.angles(3, pairs=8)),
        "of 64 candidates": lambda: backend.packed.select(query, held.keys, tail, 0, [64], 65),
    }


@pytest.mark.parametrize("backend", [law, cpu] if cpu.why_not() is None else [law])
@pytest.mark.parametrize("reason", refusals(law))
def test_what_would_be_read_wrongly_is_refused(backend, reason):
    with pytest.raises(ValueError, match=reason):
        refusals(backend)[reason]()
