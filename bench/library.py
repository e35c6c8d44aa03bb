"""A prompt that begins as another one: how much sooner is its first token there with a library than without?

One run of the embedded model: for each method, a prompt of a shared prefix and tokens of its own is read without a
library, then with one that has read the same prefix with other tokens behind it, in memory, and from a folder (a new
library, its file in the system's page cache). The time ends with the first token; that of the processor, over all
threads, is told too, because other programs do not change it. All three must give the same tokens.

    python bench/library.py --prefix 3000 --own 200 --rounds 3
"""

import argparse
import tempfile
import time
from statistics import median
from typing import Any

import torch
from common import load_embedded, save, table
from torch import Tensor

from kvote import Library

METHODS = ("dense", "tokenselect(top_k=512, sinks=16, window=256, chunk=128)")
TOKENS = 8


def first_token(library: Library, model: Any, method: str, ids: Tensor) -> tuple[float, float, int, list[int]]:
    """Seconds until the first token, those of the processor, tokens that were not read again, and the tokens that
    follow ``ids`` [1, n]."""
    begin, busy = time.perf_counter(), time.process_time()
    # generate() reads the last one.
    cache, reused = library.cache(model, method, ids[:, :-1])
    first = model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    rest = model.generate(first, past_key_values=cache, max_new_tokens=TOKENS - 1, do_sample=False)
    return seconds, busy, reused, rest[0, ids.shape[1] :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, default=3000)
    parser.add_argument("--own", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, rows, results = load_embedded()[0], [], []
    known, generator = model.get_input_embeddings().weight.shape[0], torch.Generator().manual_seed(7)
    sizes = (options.prefix, options.own, options.own)
    prefix, *own = (torch.randint(5, known, (1, n), generator=generator) for n in sizes)
    before, ids = (torch.cat([prefix, each], dim=1) for each in own)
    for method in METHODS:
        Library().cache(model, method, ids[:, :600])
        runs: dict[str, list[tuple[float, float, int, list[int]]]] = {"none": [], "memory": [], "disk": []}
        for _ in range(options.rounds):
            runs["none"].append(first_token(Library(), model, method, ids))
            with tempfile.TemporaryDirectory() as folder:
                library = Library(folder)
                library.cache(model, method, before)
                library.flush()
                runs["memory"].append(first_token(library, model, method, ids))
                runs["disk"].append(first_token(Library(folder), model, method, ids))
        if any(run[3] != runs["none"][0][3] for each in runs.values() for run in each):
            raise SystemExit(f"{method}: a hit gives other tokens than a miss")
        result: dict[str, Any] = {"method": method}
        for where, each in runs.items():
            result[where] = {
                "seconds": median(run[0] for run in each),
                "processor_seconds": median(run[1] for run in each),
                "reused": each[0][2],
            }
        results.append(result)
        for where, got in result.items():
            if where != "method":
                sooner = [result["none"][of] / got[of] for of in ("seconds", "processor_seconds")]
                figures = (got["seconds"], sooner[0], got["processor_seconds"], sooner[1])
                rows.append([method.split("(")[0], where, str(got["reused"]), *(f"{cell:.2f}" for cell in figures)])
    header = ["method", "read before", "reused", "first token s", "sooner", "processor s", "less"]
    print(table(header, rows))
    save("library", {**vars(options), "results": results})


if __name__ == "__main__":
    main()
