"""The table of kernels: what each part of a decode step costs on this machine, against torch's own attention."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from kvote import kernels
from kvote.env import memory
from kvote.errors import InputError
from kvote.measure.clock import timed
from kvote.measure.geometry import Geometry
from kvote.measure.sweep import Sweep
from kvote.measure.workload import BASELINE, SKETCHES, TOP_K, Kernel, Workload, reads, sketch_bytes

TOKENS = 131_072
# With fewer, a selection would not leave out what it is there to leave out.
FEWEST = 4096
# Memory that checks and torch take besides what is held.
_SPARE = 1.5
# What is slower than the baseline by this much is timed once.
_TOO_SLOW = 5
# Of each kernel in each round: seconds, and calls at most.
_SECONDS, _CALLS = 0.2, 8


@dataclass(frozen=True)
class Row:
    """One kernel. ``ratio`` is how many times faster than the baseline it is; ``gb_per_s`` counts the bytes that it
    must read, None where there are none, and ``share`` is that of the bandwidth; ``called_once``: it was so slow that
    one call had to do."""

    kernel: str
    ms: float
    shortest_ms: float
    longest_ms: float
    ratio: float
    gb_per_s: float | None
    share: float | None
    called_once: bool


@dataclass(frozen=True)
class Table:
    """All kernels at one length, the baseline first, and the bandwidth read meanwhile in GB/s."""

    tokens: int
    bandwidth: float
    lowest_bandwidth: float
    highest_bandwidth: float
    rows: list[Row]


@dataclass(frozen=True)
class _Round:
    """Seconds of a call, and the bandwidth read between its repetitions."""

    seconds: float
    bandwidth: float


def needed(geometry: Geometry, tokens: int) -> int:
    """Bytes that measuring takes: one cache for torch, and one per sketch."""
    positions = 4 * geometry.kv_heads * len(SKETCHES) * tokens
    sketches = sum(sketch_bytes(geometry, tokens, bits) for bits in SKETCHES.values() if bits)
    held = (1 + len(SKETCHES)) * geometry.token_bytes * tokens + positions + sketches
    return int(_SPARE * held)


def default_tokens(geometry: Geometry) -> int:
    """131,072, or the largest power of two whose measuring fits into the memory that is free."""
    tokens, free = TOKENS, memory()[1]
    while free and tokens > FEWEST and needed(geometry, tokens) > free:
        tokens //= 2
    return tokens


def refuse(geometry: Geometry, tokens: int) -> None:
    """Raises InputError for what cannot be measured here."""
    if geometry.heads % geometry.kv_heads:
        raise InputError(f"{geometry.heads} query heads cannot share {geometry.kv_heads} key heads evenly.")
    missing, most = (
        kernels.why_not_compiled(torch.empty(0, geometry.dim, dtype=geometry.dtype)),
        reads(geometry).MAX_QUERIES_PER_KV,
    )
    if missing is not None:
        raise InputError(f"There are no compiled kernels to measure here: {missing}.")
    if geometry.heads > geometry.kv_heads * most:
        raise InputError(f"kvote's kernels read for at most {most} query heads per key head.")
    if tokens < FEWEST:
        raise InputError(f"{tokens:,} tokens are too few to select {TOP_K:,} from; give at least {FEWEST:,}.")
    free, gib = memory()[1], 2**30
    if free and needed(geometry, tokens) > free:
        raise InputError(
            f"Measuring with {tokens:,} tokens needs {needed(geometry, tokens) / gib:,.1f} GiB of memory, and "
            f"{free / gib:,.1f} GiB are free; give fewer --tokens."
        )


def measure(
    geometry: Geometry, tokens: int, sweep: Sweep, rounds: int = 5, say: Callable[[str], None] = lambda what: None
) -> Table:
    """Checks all kernels against the law, then times them. Raises WrongAnswerError if one is wrong."""
    say(f"{tokens:,} tokens: filling {len(SKETCHES) + 1} caches")
    work = Workload(geometry, tokens)
    baseline, *others = work.kernels()
    slow = work.as_it_comes()
    say(f"{tokens:,} tokens: checking answers")
    for kernel in (baseline, slow, *others):
        kernel.check()
    say(f"{tokens:,} tokens: timing")
    sweep.samples.clear()
    once, beside = (_round(kernel, sweep, most=1) for kernel in (slow, baseline))
    too_slow = once.seconds > _TOO_SLOW * beside.seconds
    spent: dict[str, list[_Round]] = {slow.name: [once] if too_slow else []}
    for _ in range(rounds):
        for kernel in (baseline, *others) if too_slow else (baseline, slow, *others):
            spent.setdefault(kernel.name, []).append(_round(kernel, sweep, most=_CALLS))
    rows = [
        _row(kernel, spent[kernel.name], spent[BASELINE], once=too_slow and kernel is slow)
        for kernel in (baseline, slow, *others)
    ]
    low, high = min(sweep.samples), max(sweep.samples)
    return Table(tokens, 1e-9 * sweep.bandwidth, 1e-9 * low, 1e-9 * high, rows)


def _round(kernel: Kernel, sweep: Sweep, *, most: int) -> _Round:
    before = len(sweep.samples)
    seconds = timed(kernel.call, seconds=_SECONDS, most=most, before=sweep)
    return _Round(seconds, median(sweep.samples[before:]))


def _row(kernel: Kernel, rounds: list[_Round], baseline: list[_Round], *, once: bool) -> Row:
    """Ratios are taken round by round, so that a machine that slows down in between does not distort them."""
    seconds = [spent.seconds for spent in rounds]
    return Row(
        kernel=kernel.name,
        ms=1000 * median(seconds),
        shortest_ms=1000 * min(seconds),
        longest_ms=1000 * max(seconds),
        ratio=median(base.seconds / spent.seconds for base, spent in zip(baseline, rounds, strict=False)),
        gb_per_s=1e-9 * kernel.bytes / median(seconds) if kernel.bytes else None,
        share=median(kernel.bytes / spent.seconds / spent.bandwidth for spent in rounds) if kernel.bytes else None,
        called_once=once,
    )
