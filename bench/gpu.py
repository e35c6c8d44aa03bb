"""kvote's GPU kernels: are they right, and how fast are they; TokenSelect's own measurement first of all.

The paper reports the attention of one prefill chunk of 512 queries over 128 + 2,048 + 512 tokens against full
attention, on an A100 in the geometry of Qwen2-7B: 6.09x at 128K cached tokens, 19.93x at 512K, 23.84x at 1M. Here: the
same on whatever GPU there is, against torch's flash attention; a decode step at these lengths; the share of the
bandwidth that each kernel reaches; and a whole model with random weights in the shape of Llama-3.1-8B.

Every kernel is checked first, against the float32 reference, on fresh random numbers and with outputs that start as
NaN; if one is wrong there are no figures. Times are those of captured graphs between device events, medians, with the
second-level cache evicted before each. Needs no network and some eight minutes; one table, and bench/results/gpu.json,
which grows line by line, so that what fails or is stopped costs nothing else its figures.

    python bench/gpu.py
    python bench/gpu.py --interpret     # tiny sizes in Triton's interpreter, without a GPU: the logic, no times
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

if "--interpret" in sys.argv:
    # Triton looks when it is loaded.
    os.environ.update(TRITON_INTERPRET="1", KVOTE_BACKEND="triton")

import torch
from common import RESULTS, save, table

from kvote.kernels import gpu

BEGIN = time.perf_counter()
LENGTHS = {"32K": 32_768, "128K": 131_072, "512K": 524_288, "1M": 1_048_576}
# What the paper reports for one chunk, on an A100.
PAPER = {"128K": 6.09, "512K": 19.93, "1M": 23.84}
# Memory left for what is made on the way.
_SPARE = 8 << 30


def say(what: str) -> None:
    print(f"[{time.perf_counter() - BEGIN:5.0f} s] {what}", file=sys.stderr, flush=True)


def chunk_rows(work: Any, clock: Any, length: str) -> Iterator[dict[str, Any]]:
    """(b) Attention of one chunk: the paper's list, and kvote's, whose window begins before the chunk."""
    sizes, query = work.sizes, work.query(work.sizes.chunk)
    name, dense = clock.fastest(work.baselines(query))
    yield row("b chunk", length, f"torch flash, {name}", dense, dense)
    for bits in (0, 8, 4):
        if bits:
            work.sketch(bits)
        said = "tokenselect" if not bits else f"tokenselect, {bits}-bit sketch"
        spent = clock.ms(lambda bits=bits: work.chunk(query, sizes.chunk, bits))
        yield row("b chunk", length, said, spent, dense, paper=None if bits else PAPER.get(length))
    spent = clock.ms(lambda: work.chunk(query, sizes.chunk + sizes.window))
    yield row("b chunk", length, "tokenselect, window before the chunk", spent, dense)


def step_rows(work: Any, clock: Any, length: str, copy: float | None) -> Iterator[dict[str, Any]]:
    """(c) A decode step, and (d) what share of the copy's bandwidth its kernels reach."""
    from gpu_work import PACKED_BITS

    sizes, query, b = work.sizes, work.query(1), work.batch
    part, keys = f"c step, batch {b}", work.batch * work.tokens * work.sizes.token_bytes
    name, dense = clock.fastest(work.baselines(query))
    yield row(part, length, f"torch flash, {name}", dense, dense, 2 * keys, copy)
    yield row(part, length, "kvote dense", clock.ms(lambda: work.dense(query)), dense, 2 * keys, copy)
    edge = work.tokens - sizes.window
    scored = b * (edge - sizes.sinks) * sizes.token_bytes
    index = work.listed(work.select(query, edge), edge)
    listed = 2 * b * index.shape[-1] * sizes.token_bytes
    scoring = work.rotated(query, sizes.window).float()
    for bits in (0, 8, 4):
        work.sketch(bits)
        bits_said = f", {bits}-bit sketch" if bits else ""
        read = scored if not bits else b * sizes.kv_heads * (edge - sizes.sinks) * (sizes.dim * bits // 8 + 2)
        given = scoring, work.keys, work.lanes, work.sketch(bits), bits, sizes.sinks, [edge]
        spent = clock.ms(lambda given=given: votes_of(*given))
        yield row(f"d kernel, batch {b}", length, f"votes{bits_said}", spent, None, read, copy)
        spent = clock.ms(lambda bits=bits: work.step(query, bits))
        yield row(part, length, f"tokenselect{bits_said}", spent, dense, read + listed, copy)
    spent = clock.ms(lambda: work.read_list(query, index))
    said = f"attention to a list of {index.shape[-1]:,}"
    yield row(f"d kernel, batch {b}", length, said, spent, dense, listed, copy)
    for bits in PACKED_BITS:
        packed = work.packed(bits)
        read = sum(pages.nbytes for pages, _, _ in packed)
        spent = clock.ms(lambda packed=packed: work.read_packed(query, packed))
        said = f"attention to packed tokens, {bits} bits"
        yield row(f"d kernel, batch {b}", length, said, spent, None, read, copy)
        del packed
    counted = votes_of(scoring, work.keys, work.lanes, None, 0, sizes.sinks, [edge])
    spent = clock.ms(lambda: top_k_of(counted, sizes.top_k))
    yield row(f"d kernel, batch {b}", length, f"top-k, {sizes.top_k:,}", spent, None, counted.nbytes, copy)


def votes_of(*given: Any) -> Any:
    from kvote.kernels import triton as fast

    return fast.votes(*given)


def top_k_of(votes: Any, k: int) -> Any:
    from kvote.kernels import triton as fast

    return fast.top_k(votes, k)


def row(
    part: str,
    length: str,
    name: str,
    spent: dict[str, float] | None,
    dense: dict[str, float] | None,
    read: int | None = None,
    copy: float | None = None,
    paper: float | None = None,
) -> dict[str, Any]:
    """One line. ``ratio``: times faster than torch; ``share``: bytes that must be read, per second, of the copy's."""
    ratio = dense["ms"] / spent["ms"] if dense and spent else None
    share = read / spent["ms"] * 1000 / copy if spent and read and copy else None
    return {
        "part": part,
        "tokens": length,
        "kernel": name,
        **(spent or {"ms": None, "least_ms": None, "most_ms": None}),
        "ratio": ratio,
        "share_of_copy": share,
        "paper_ratio": paper,
    }


def shown(rows: list[dict[str, Any]]) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    return table(
        ["part", "tokens", "kernel", "ms", "times faster than torch", "of the copy's bandwidth", "the paper's, A100"],
        [
            [
                r["part"],
                r["tokens"],
                r["kernel"],
                number(r["ms"], "{:.3f}"),
                number(r["ratio"], "{:.2f}x"),
                number(r["share_of_copy"] and 100 * r["share_of_copy"], "{:.0f}%"),
                number(r["paper_ratio"], "{:.2f}x"),
            ]
            for r in rows
        ],
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    from gpu_clock import Clock, ceilings
    from gpu_work import Sizes, Work, check

    tiny = options.interpret
    device = torch.device("cpu" if tiny else "cuda")
    sizes = Sizes(heads=4, kv_heads=2, dim=32, sinks=4, top_k=8, window=16, chunk=16) if tiny else Sizes()
    lengths = {"128": 128} if tiny else LENGTHS
    clock = Clock(device, options.rounds)
    say("checking every kernel against the reference")
    errors = check(Work(sizes, next(iter(lengths.values())), 2, device))
    say("ceilings")
    roof = ceilings(clock, tiny)
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    name = "Triton's interpreter" if tiny else torch.cuda.get_device_name()
    result = {"gpu": name, "errors": errors, "ceilings": roof, "rows": rows, "failures": failures}

    def keep() -> None:
        result["seconds"] = time.perf_counter() - BEGIN
        if not tiny:
            save("gpu", result)

    def add(part: str, make: Callable[[], Iterator[dict[str, Any]]]) -> None:
        """What a part measures, as far as it comes: what fails in it costs no other its figures."""
        say(part)
        try:
            for each in make():
                rows.append(each)
                keep()
        except Exception as error:
            failures[part] = f"{type(error).__name__}: {error}"
            say(f"{part} failed: {failures[part]}")
        keep()
        if not tiny:
            torch.cuda.empty_cache()

    def of_length(length: str, tokens: int, batch: int) -> Iterator[dict[str, Any]]:
        work = Work(sizes, tokens, batch, device)
        if batch == 1:
            yield from chunk_rows(work, clock, length)
        yield from step_rows(work, clock, length, roof["copy_bytes_per_s"])

    def of_a_model() -> Iterator[dict[str, Any]]:
        from gpu_model import model_rows

        yield from model_rows(device, tiny, options.model_tokens, say)

    for length, tokens in lengths.items():
        for batch in (1,) if tiny else (1, 8):
            if not tiny and 3 * batch * tokens * sizes.token_bytes + _SPARE > torch.cuda.mem_get_info()[0]:
                say(f"{length} tokens times {batch} do not fit into this GPU: left out")
                continue
            add(f"{length} tokens, batch {batch}", partial(of_length, length, tokens, batch))
    add("a whole model", of_a_model)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interpret", action="store_true", help="tiny sizes in Triton's interpreter, no times")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--model-tokens", type=int, default=131_072)
    options = parser.parse_args()
    missing = gpu.why_not()
    if missing is not None:
        print(f"There is nothing to measure here: {missing}.", file=sys.stderr)
        return 2
    with torch.no_grad():
        result = measure(options)
    print(shown(result["rows"]))
    print(f"\n{result['gpu']}; ceilings {result['ceilings']}; largest error {max(result['errors'].values()):.2g}")
    if not options.interpret:
        print(f"written to {RESULTS / 'gpu.json'}")
    for part, error in result["failures"].items():
        print(f"{part} failed: {error}", file=sys.stderr)
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
