"""One call of every comparison for each way a kernel can go, small enough to repeat and large enough to be shared."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import comparisons as c
import torch
from paged import DTYPES, Case
from torch import Tensor

from kvote.kernels import cpu

Check = Callable[[], list[Tensor]]


def some_votes(rows: int, n: int) -> Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(0)).round(decimals=2)


def examples(case: Case) -> dict[str, Check]:
    """Comparisons by name, for a case of a hundred tokens or more."""
    start, limits, half = 3, [case.n - 2, case.n], case.n // 2
    return {
        "votes": partial(c.votes_equal_the_reference, case, start, limits),
        "votes of 8 bits": partial(c.votes_equal_the_reference, case, start, limits, 8),
        "votes of 4 bits": partial(c.votes_equal_the_reference, case, start, limits, 4),
        "select": partial(c.select_takes_the_winners_of_the_vote, case, start, limits, 20, 0),
        "select by 8 bits": partial(c.select_takes_the_winners_of_the_vote, case, start, limits, 20, 8),
        "nominate by 4 bits": partial(c.select_rescores_what_was_nominated, case, start, limits, 8, 40, 4),
        "top_k": partial(c.top_k_finds_the_largest, some_votes(3, case.n), 20),
        "decode": partial(c.decode_equals_the_reference, case, range(1, case.n)),
        "decode turned": partial(c.decode_equals_the_reference, case, half, pairs=case.d // 2),
        "decode capped": partial(c.decode_equals_the_reference, case, half, pairs=8, interleaved=True, softcap=3.0),
        "mass": partial(c.mass_equals_the_reference, case, start, limits),
        "mass capped": partial(c.mass_equals_the_reference, case, start, limits, softcap=3.0),
        "scores": partial(c.scores_equal_the_reference, case, start, case.n - 2),
        "label scores": partial(c.scores_equal_the_reference, case, start, case.n - 2, labels=11),
        "turn": partial(c.turn_equals_the_reference, case, case.d // 2),
        "turn strided": partial(c.turn_equals_the_reference, case, 8, interleaved=True, strided=True),
        "gather": partial(c.gather_fetches_and_turns, case, half, case.d // 2),
        "gather interleaved": partial(c.gather_fetches_and_turns, case, half, 8, True),
        "append": partial(c.append_stores_and_sketches, case, half, value_dim=16, strided=True),
        "append and sketch": partial(c.append_stores_and_sketches, case, half, bits=8),
        "sketch of 8 bits": partial(c.sketch_stands_for_the_keys, case, 8),
        "sketch of 4 bits": partial(c.sketch_stands_for_the_keys, case, 4),
    }


SMALL = Case(n=150, sequences=2, heads=2, groups=3, d=64)
# Several tiles of tokens, parts of a list and rows enough to be worth a second thread.
LARGE = replace(SMALL, n=4500, sequences=1)
NAMES = list(examples(SMALL))
SETS = cpu.instruction_sets() if cpu.why_not() is None else []
# Head sizes and groups for every way through a kernel, in every dtype.
SHAPES = [replace(SMALL, d=d, groups=g, dtype=t, seed=d) for d, g in ((16, 1), (80, 5), (128, 16)) for t in DTYPES]


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = cpu.instruction_set()
    assert cpu.use(name)
    try:
        yield
    finally:
        cpu.use(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
