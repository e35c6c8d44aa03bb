"""Methods on a real model with a quarter of the tokens, from a folder of ``kvote eval``: keys found when they are
asked for after the text was read, and perplexity of a novel.

    kvote eval --model SmolLM2-135M-Instruct.Q4_1.gguf --out FOLDER --samples 4 --lengths 4096 --no-baselines \\
        --tasks niah_multikey_1 perplexity --budgets 1024 --methods tokenselect streamingllm snapkv ...
    python bench/all_methods.py FOLDER
"""

import argparse
import json
import re
from pathlib import Path
from statistics import median
from typing import Any

from common import RESULTS, table

from kvote.eval.folder import read_manifest, read_records
from kvote.files import write_whole


def figures(folder: Path) -> list[dict[str, Any]]:
    """Per method: keys found of those asked for, perplexity at the places that all were measured at, tokens held and
    read, and bytes; without methods that were not measured at both tasks."""
    records = [each for each in read_records(folder).values() if "refused" not in each]
    own: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for each in records:
        own.setdefault(each["name"], {}).setdefault(each["task"], {})[each["index"]] = each
    own = {name: tasks for name, tasks in own.items() if {"niah_multikey_1", "perplexity"} <= tasks.keys()}
    places, texts = (
        sorted(set.intersection(*(set(tasks[task]) for tasks in own.values())))
        for task in ("perplexity", "niah_multikey_1")
    )
    rows = []
    for name, tasks in own.items():
        asked = [tasks["niah_multikey_1"][i] for i in texts]
        scores = [score for each in asked for score in each["scores"]]
        rows.append(
            {
                # A calibration is named by what it is, not by where it lay.
                "method": re.sub(r"'[^']*\.json'", "FILE", name),
                "keys": [sum(scores), len(scores)],
                "perplexity": [tasks["perplexity"][i]["perplexity"] for i in places],
                "tokens_held": max(each["tokens_held"] for each in asked),
                "tokens_read": max(each["tokens_read"] for each in asked),
                "nbytes": max(each["nbytes"] for each in asked),
            }
        )
    return sorted(rows, key=lambda row: (-row["keys"][0], median(row["perplexity"])))


def render(rows: list[dict[str, Any]]) -> str:
    """The table of docs/measured.md."""
    cells = [
        [
            row["method"].removesuffix(" @ 1024").replace("|", "\\|"),
            "{:.0f} of {}".format(*row["keys"]),
            f"{median(row['perplexity']):.1f}",
            f"{row['tokens_held']:,}",
            f"{row['tokens_read']:,}",
            f"{row['nbytes'] / 2**20:.0f}",
        ]
        for row in rows
    ]
    return table(["", "keys found", "perplexity", "tokens held", "tokens read", "MiB"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    rows, manifest = figures(options.folder), read_manifest(options.folder)
    kept = {key: manifest[key] for key in ("model", "model_sha256", "tokenizer_sha256", "dtype", "seed")}
    kept["runs"] = sorted({(run["commit"], run["cpu"], run["threads"]) for run in manifest["runs"]})
    write_whole(RESULTS / "all_methods.json", json.dumps({"manifest": kept, "rows": rows}, indent=1) + "\n")
    print(render(rows))


if __name__ == "__main__":
    main()
