"""A cache on a disk: what a process takes in memory that reads a long document and answers, with the cache in memory
and with ``offload``, each in a process of its own.

python bench/offload.py --tokens 1048576 --folder /var/tmp
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import load_embedded, save, table

import kvote
from kvote.models import world
from kvote.models.presets import preset


def peak() -> int:
    """The most bytes that this process had in memory, of whatever kind (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def measured(spec: str, tokens: int) -> dict[str, Any]:
    model, tokenizer = load_embedded()
    sample = world.sample("needle", tokens, seed=7)
    before = peak()
    document = kvote.Document(model, tokenizer, sample.document, spec, tokens_per_pass=4096)
    fetched = sum(layer.disk_read for layer in document.cache.report().layers)
    answer = document.ask(sample.questions[0].prompt, max_new_tokens=4)
    layers = document.cache.report().layers
    return {
        "method": spec,
        "right": answer.text == sample.questions[0].answer,
        "peak_bytes": peak(),
        "peak_before_reading": before,
        "memory_bytes": document.cache.nbytes(),
        "disk_bytes": sum(layer.disk_nbytes for layer in layers),
        "fetched_while_reading": fetched,
        "reading_seconds": document.prefill_seconds,
        "first_token_seconds": answer.first_token_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_048_576)
    parser.add_argument("--folder", default="/var/tmp", help="on a disk")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measured(options.only, options.tokens)))
        return
    rows = []
    read = preset("tokenselect")
    for spec in (read, f"{read} | offload(folder={options.folder!r})"):
        command = [sys.executable, __file__, "--tokens", str(options.tokens), "--only", spec]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    save(f"offload-{options.tokens}", {"tokens": options.tokens, "rows": rows})
    cells = []
    for row in rows:
        sizes = [row[key] / 2**20 for key in ("peak_bytes", "memory_bytes", "disk_bytes", "fetched_while_reading")]
        times = f"{row['reading_seconds']:.0f}", f"{row['first_token_seconds']:.2f}"
        cells.append([row["method"], str(row["right"]), *(f"{size:,.0f}" for size in sizes), *times])
    heads = ["", "right", "process, MiB", "cache, MiB", "on disk, MiB", "fetched, MiB", "reading, s", "first token, s"]
    print(table(heads, cells))


if __name__ == "__main__":
    main()
