"""Accuracy against length: one needle among eight, for texts up to 1,024 times longer than the model was trained on.

Every document is read once and asked all its questions; an answer is right when it is exactly the number. Lengths
count document, question and answer. A stopped run goes on where it was (results/extrapolation.json).

    python bench/extrapolation.py                    # all methods and lengths, hours on two cores
    python bench/extrapolation.py --methods tokenselect --lengths 1024 65536
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common import RESULTS, load_embedded, save, table

import kvote
import kvote.spec
from kvote.models import world
from kvote.models.presets import preset

NEEDLES = 8
ROOM = 48  # tokens left for a question and its answer
LENGTHS = [1 << i for i in range(10, 21)]
_PUBLISHED = "tokenselect(top_k=512, sinks=16, window=256, chunk=128, {}published=True)"
# By name of a row: the spec that it stands for.
METHODS = {
    "dense": preset("dense"),
    "tokenselect": preset("tokenselect"),
    "as published": _PUBLISHED.format(""),
    "as published, with a tail": _PUBLISHED.format("tail=40, "),
    "streamingllm": preset("streamingllm"),
    "random": preset("random"),
}


def documents(length: int) -> int:
    """Documents per point: 7 x 8 questions up to 64K tokens, fewer beyond."""
    return 7 if length <= 65_536 else 4 if length <= 262_144 else 1


def measure(model: Any, tokenizer: Any, method: str, length: int, seed: int) -> dict[str, Any]:
    sample = world.sample("needle", length - ROOM, seed=1_000_000 + seed, facts=NEEDLES, questions=NEEDLES)
    document = kvote.Document(model, tokenizer, sample.document, METHODS[method])
    begin = time.perf_counter()
    answers = [document.ask(question.prompt, max_new_tokens=4) for question in sample.questions]
    right = [answer.text == question.answer for answer, question in zip(answers, sample.questions, strict=True)]
    return {
        "method": method,
        "spec": document.cache.method.spec,
        "length": length,
        "seed": seed,
        "right": sum(right),
        "asked": len(right),
        "wrong_depths": [round(q.depth, 3) for q, ok in zip(sample.questions, right, strict=True) if not ok],
        "prefill_seconds": round(document.prefill_seconds, 3),
        "question_seconds": round((time.perf_counter() - begin) / len(right), 3),
        "kv_bytes": document.cache.nbytes(),
    }


def accuracy(points: list[dict[str, Any]], method: str, length: int) -> tuple[float, int] | None:
    """Share of right answers and number of questions at one point, None if it was not measured."""
    hits = [p for p in points if p["method"] == method and p["length"] == length]
    asked = sum(p["asked"] for p in hits)
    return (sum(p["right"] for p in hits) / asked, asked) if asked else None


def render(points: list[dict[str, Any]]) -> str:
    methods = [m for m in METHODS if any(p["method"] == m for p in points)]
    rows = []
    for length in sorted({p["length"] for p in points}):
        cells = [accuracy(points, method, length) for method in methods]
        rows.append([f"{length:,}", *("" if c is None else f"{100 * c[0]:.0f}% ({c[1]})" for c in cells)])
    return table(["tokens", *methods], rows)


def picture(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), dpi=150)
    styles = {
        "tokenselect": ("#0b6e4f", "o"),
        "as published": ("#c77d0a", "v"),
        "as published, with a tail": ("#6a4c93", "D"),
        "dense": ("#b23a48", "s"),
        "streamingllm": ("#3d5a80", "^"),
        "random": ("#8d99ae", "x"),
    }
    for method in METHODS:
        lengths = sorted({p["length"] for p in points if p["method"] == method})
        shares = [accuracy(points, method, length) for length in lengths]
        colour, marker = styles[method]
        axes.plot(lengths, [100 * s[0] for s in shares if s], color=colour, marker=marker, label=method, linewidth=2)
    axes.axvline(1024, color="grey", linestyle=":", linewidth=1)
    axes.text(1060, 103, "trained length", fontsize=8, color="grey")
    axes.set_xscale("log", base=2)
    ticks = sorted({p["length"] for p in points})
    axes.set_xticks(ticks, [f"{t // 1024}K" if t < 1 << 20 else f"{t >> 20}M" for t in ticks])
    axes.set_ylim(-3, 110)
    axes.set_xlabel("tokens in the context")
    axes.set_ylabel("right answers, %")
    axes.legend(loc="center right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--documents", type=int, help="documents per point instead of the default")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    stored = RESULTS / "extrapolation.json"
    points: list[dict[str, Any]] = (
        [] if options.fresh or not stored.exists() else json.loads(stored.read_text())["points"]
    )
    model, tokenizer = load_embedded()
    for length in options.lengths:
        for method in options.methods:
            # Points made with other parameters are measured anew.
            same = [p for p in points if p["method"] == method and p["length"] == length]
            points = [p for p in points if p not in same or p["spec"] == kvote.spec.parse(METHODS[method]).spec]
            done = {p["seed"] for p in points if p["method"] == method and p["length"] == length}
            for seed in range(options.documents or documents(length)):
                if seed not in done:
                    points.append(measure(model, tokenizer, method, length, seed))
                    save("extrapolation", {"needles": NEEDLES, "points": points})
            share = accuracy(points, method, length)
            if share:
                print(f"{length:>9,} {method:<25} {100 * share[0]:6.1f}% of {share[1]}", flush=True)
    (RESULTS / "extrapolation.md").write_text(render(points) + "\n")
    picture(points, RESULTS / "extrapolation.png")
    print(render(points))


if __name__ == "__main__":
    main()
