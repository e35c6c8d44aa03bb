"""Lanes laid out over a pool of pages, the same tokens as plain tensors, and outputs that show a write beside them."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from kvote.kernels import cpu
from kvote.kernels.cpu import attention, packed, scoring
from kvote.kernels.cpu import tokens as rows_of_tokens
from kvote.kernels.lanes import Lanes
from kvote.store.pages import PAGE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 63, 64, 65, 100, 1000, 4097]
SIZES = [16, 32, 64, 80, 96, 128, 256]
compiled = pytest.mark.skipif(cpu.why_not() is not None, reason=str(cpu.why_not()))

# What lies around every output, and must be there afterwards; inside, outputs start as NaN or absurd integers.
_MARK, _GUARD = 77, 256


@dataclass(frozen=True)
class Case:
    """Shapes of one call. ``size`` multiplies the keys; ``pages`` is how lanes lie: a run each, scattered or mixed."""

    n: int = 100
    sequences: int = 1
    heads: int = 2
    groups: int = 2
    d: int = 32
    dtype: torch.dtype = torch.float32
    pages: str = "scattered"
    size: float = 1.0
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.d**-0.5


@st.composite
def cases(draw: Any, lengths: Sequence[int] = LENGTHS) -> Case:
    n, d = draw(st.sampled_from(lengths)), draw(st.sampled_from(SIZES))
    few = st.integers(1, 3 if n * d < 1 << 16 else 1)
    return Case(
        n=n,
        sequences=draw(few),
        heads=draw(few | st.just(2)),
        groups=draw(st.integers(1, 8) | st.just(16)),
        d=d,
        dtype=draw(st.sampled_from(DTYPES)),
        pages=draw(st.sampled_from(["run", "scattered", "mixed"])),
        size=draw(st.sampled_from([1.0, 1.0, 1e3, 1e4])),
        seed=draw(st.integers(0, 99)),
    )


class Paged:
    """The tokens of a case: in pools, as ``key`` and ``value`` [sequences, heads, n, d], and where lanes lie.

    Whatever of the pools holds no token is NaN, and so are its sketches.
    """

    def __init__(self, case: Case, bits: int = 0) -> None:
        self.case = case
        self.random = torch.Generator().manual_seed(case.seed)
        lanes = case.sequences * case.heads
        self.runs = self._lay_out(lanes, -(-case.n // PAGE))
        pages = max(first + count for lane in self.runs for first, count in lane) + 1
        self.keys = torch.full((pages, PAGE, case.d), float("nan"), dtype=case.dtype)
        self.values = torch.full((pages, PAGE, case.d), float("nan"), dtype=case.dtype)
        shape = (case.sequences, case.heads, case.n, case.d)
        self.key = (case.size * self.randn(*shape)).to(case.dtype)
        self.value = self.randn(*shape).to(case.dtype)
        self.held = torch.stack([self.slots(lane, range(case.n)) for lane in range(lanes)])
        for pool, tokens in ((self.keys, self.key), (self.values, self.value)):
            pool.view(-1, case.d)[self.held.flatten()] = tokens.reshape(-1, case.d)
        self.sketch = None
        if bits:
            width = PAGE // cpu.SKETCH_TOKENS * cpu.sketch_bytes(case.d, bits)
            self.sketch = torch.full((pages, width), 255, dtype=torch.uint8)
            cpu.sketch(self.keys, self.sketch, bits, self.table(), 0, case.n)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def below(self, n: int) -> int:
        return int(torch.randint(n, (1,), generator=self.random))

    def _lay_out(self, lanes: int, pages: int) -> list[list[tuple[int, int]]]:
        chunks: list[tuple[int, int]] = []
        for lane in range(lanes):
            left = pages + self.below(2)
            if self.case.pages == "mixed":
                chunks.append((lane, 0))
            while left:
                most = {"run": left, "scattered": 1, "mixed": 1 + self.below(3)}[self.case.pages]
                chunks.append((lane, min(left, most)))
                left -= chunks[-1][1]
        runs: list[list[tuple[int, int]]] = [[] for _ in range(lanes)]
        cursor = self.below(2)
        for i in torch.randperm(len(chunks), generator=self.random).tolist():
            lane, count = chunks[i]
            # An empty run marks the place of a lane that had no page yet; it comes first.
            runs[lane].insert(len(runs[lane]) if count else 0, (cursor, count))
            cursor += count + self.below(2)
        return runs

    def slots(self, lane: int, tokens: Sequence[int]) -> Tensor:
        """Pool slots of tokens of a lane, by a list of all its pages."""
        pages = [first + i for first, count in self.runs[lane] for i in range(count)]
        return torch.tensor([pages[token // PAGE] * PAGE + token % PAGE for token in tokens], dtype=torch.int64)

    def table(self, sequence: int | None = None) -> Lanes:
        """Lanes of one sequence, or of all."""
        h = self.case.heads
        return Lanes(self.runs if sequence is None else self.runs[sequence * h : (sequence + 1) * h])

    def query(self, *rows: int) -> Tensor:
        """Queries [sequences, heads, *rows, d] that prefer some tokens to others, in the dtype of the keys."""
        case = self.case
        return (2 * self.randn(case.sequences, case.heads * case.groups, *rows, case.d)).to(case.dtype).float()

    def some_tokens(self, count: int) -> Tensor:
        """A list [sequences, count] of tokens, ascending, another one for each sequence."""
        lists = [torch.randperm(self.case.n, generator=self.random)[:count] for _ in range(self.case.sequences)]
        return torch.stack(lists).sort(dim=-1).values

    def angles(self, *rows: int, pairs: int) -> tuple[Tensor, Tensor]:
        angle = 3 * self.randn(*rows, pairs)
        return angle.cos(), angle.sin()

    def slack(self, query: Tensor, scale: float) -> float:
        """What float32 sums in another order may differ by, in logits."""
        return 3e-7 * scale * float(query.norm(dim=-1).max() * self.key.float().norm(dim=-1).max())


def guarded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor between two marked areas, which ``intact`` looks at."""
    count = torch.Size(shape).numel()
    whole = torch.full((count + 2 * _GUARD,), _MARK, dtype=dtype)
    whole[_GUARD : _GUARD + count] = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max // 3
    return whole[_GUARD : _GUARD + count].view(shape)


def intact(tensor: Tensor) -> bool:
    """Whether nothing was written around a ``guarded`` tensor."""
    whole = torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage())
    return bool((whole[:_GUARD] == _MARK).all() and (whole[-_GUARD:] == _MARK).all())


class _GuardedTorch:
    """torch, as the kernels' wrapper sees it between guards: what it allocates is ``guarded``."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        self.made.append(guarded(*(shape[0] if isinstance(shape[0], Sequence) else shape), dtype=dtype))
        return self.made[-1]


def guarding(comparison: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """A comparison in which whatever kernels allocate is guarded, and must be intact in the end."""

    @wraps(comparison)
    def call(*args: Any, **kwargs: Any) -> list[Tensor]:
        seen = _GuardedTorch()
        with ExitStack() as patches:
            for module in (attention, packed, scoring, rows_of_tokens):
                patches.enter_context(mock.patch.object(module, "torch", seen))
            answers = comparison(*args, **kwargs)
        assert all(intact(tensor) for tensor in seen.made), "something was written beside an output"
        return answers

    return call
