"""What README leads with, from a folder of ``kvote eval``: a table and a picture, and the figures behind both.

    kvote eval --model SmolLM2-135M-Instruct.Q4_1.gguf --out FOLDER --samples 6 --lengths 4096 12000 --no-baselines \\
        --tasks facts niah_multikey_1 perplexity --methods "tokenselect(top_k=512, sinks=64, window=1024)" \\
        "streamingllm(sinks=64, window=1024)" "random(top_k=512, sinks=64, window=512)"
    python bench/headline.py FOLDER
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from common import RESULTS, table

from kvote.files import write_whole

NAMES = {
    "dense": "dense attention",
    "tokenselect(top_k=512, sinks=64, window=1024)": "kvote `tokenselect`",
    "streamingllm(sinks=64, window=1024)": "kvote `streamingllm`",
    "random(top_k=512, sinks=64, window=512)": "random tokens",
}


def figures(folder: Path) -> list[dict[str, Any]]:
    """Per length and method: keys found of those asked for, perplexity at each place, and tokens read per query."""
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    rows = []
    for length in sorted({each["length"] for each in records}):
        for spec in NAMES:
            own = [each for each in records if each["length"] == length and each["name"] == spec]
            scores = {
                task: [score for each in own if each["task"] == task for score in each["scores"]]
                for task in ("niah_multikey_1", "facts")
            }
            books = [each["perplexity"] for each in own if each["task"] == "perplexity"]
            asked = [each["tokens_read"] for each in own if each["task"] == "niah_multikey_1"]
            found = {task: [sum(values), len(values)] for task, values in scores.items()}
            rows.append(
                {"length": length, "method": spec, **found, "perplexity": books, "tokens_read": round(median(asked))}
            )
    return rows


def drawn(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars: keys found, and the median perplexity, of every method at both lengths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = sorted({row["length"] for row in rows})
    panes = (
        ("keys found, %", lambda r: 100 * r["niah_multikey_1"][0] / r["niah_multikey_1"][1]),
        ("perplexity of a book (median)", lambda r: median(r["perplexity"])),
    )
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, (title, value) in zip(axes, panes, strict=True):
        for place, spec in enumerate(NAMES):
            own = [value(row) for length in lengths for row in rows if (row["length"], row["method"]) == (length, spec)]
            at = [i + 0.2 * (place - 1.5) for i in range(len(lengths))]
            bars = axis.bar(at, own, 0.18, label=NAMES[spec].replace("`", "").replace("kvote ", ""))
            axis.bar_label(bars, [f"{v:.0f}" for v in own], fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(lengths)), [f"{length:,} tokens" for length in lengths])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    rows = figures(options.folder)
    manifest = json.loads((options.folder / "manifest.json").read_text())
    write_whole(RESULTS / "headline.json", json.dumps({"manifest": manifest, "rows": rows}, indent=1) + "\n")
    drawn(rows, RESULTS / "headline.png")
    cells = [
        [
            f"{row['length']:,}: {NAMES[row['method']]}",
            "{:.0f} of {}".format(*row["niah_multikey_1"]),
            f"{median(row['perplexity']):.1f}",
            f"{row['tokens_read']:,}",
        ]
        for row in rows
    ]
    print(table(["", "keys found", "perplexity", "tokens read per query"], cells))


if __name__ == "__main__":
    main()
