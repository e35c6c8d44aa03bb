"""How well the embedded model answers with the default cache: exact match per task, within and beyond its training.

    python bench/embedded.py

prints a Markdown table and writes bench/results/embedded.json. Lengths count document, questions and answers. A
sample is right when every one of its answers is, to the last token and with <eot> after it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvote.files import check_writable, write_whole
from kvote.models import embedded, world

TRAINED = 1024
FIRST_SEED = 1_000_000  # training draws from other seed sequences altogether


def within(task: str, length: int, seed: int, facts: int = 4) -> world.Sample:
    """A sample whose document, questions and answers with <eot> take exactly length tokens."""
    asked = world.sample(task, 1024, seed, facts).questions
    turns = sum(len(_words(q.prompt)) + len(_words(q.answer)) + 1 for q in asked)
    return world.sample(task, length - turns, seed, facts)


def _words(text: str) -> list[str]:
    for mark in world.GLUED:
        text = text.replace(mark, f" {mark}")
    return text.split()


@torch.no_grad()
def right(model: Any, tokenizer: Any, samples: list[world.Sample]) -> list[bool]:
    """Whether each sample's questions, asked one after another in one context, are all answered exactly."""
    contexts = [tokenizer(s.document).input_ids for s in samples]
    good = [True] * len(samples)
    for turn in range(len(samples[0].questions)):
        questions = [s.questions[turn] for s in samples]
        prompts = tokenizer([q.prompt for q in questions], add_special_tokens=False).input_ids
        contexts = [c + p for c, p in zip(contexts, prompts, strict=True)]
        inputs = tokenizer.pad({"input_ids": contexts}, return_tensors="pt")  # on the left
        answers = [[*tokenizer(q.answer, add_special_tokens=False).input_ids, world.EOT] for q in questions]
        longest = max(map(len, answers))
        generated = model.generate(**inputs, max_new_tokens=longest)[:, inputs.input_ids.shape[1] :].tolist()
        for i, (said, answer) in enumerate(zip(generated, answers, strict=True)):
            good[i] &= said[: len(answer)] == answer
            end = said.index(world.EOT) + 1 if world.EOT in said else len(said)
            contexts[i] = contexts[i] + said[:end]
    return good


def measure(model: Any, tokenizer: Any, task: str, length: int, samples: int, batch_tokens: int) -> dict[str, Any]:
    """One row of the table."""
    started, rows, scores = time.perf_counter(), max(batch_tokens // length, 1), []
    for first in range(0, samples, rows):
        seeds = range(FIRST_SEED + first, FIRST_SEED + min(first + rows, samples))
        scores += right(model, tokenizer, [within(task, length, seed) for seed in seeds])
    seconds = round(time.perf_counter() - started, 1)
    return {"task": task, "length": length, "samples": samples, "exact": sum(scores) / samples, "seconds": seconds}


def table(rows: list[dict[str, Any]]) -> str:
    """Tasks down, lengths across, exact match in percent; a length's samples stand in its heading."""
    heads = {r["length"]: r["samples"] for r in rows}
    lines = ["| task | " + " | ".join(f"{n:,} tokens ({k})" for n, k in heads.items()) + " |"]
    lines.append("|---|" + "---:|" * len(heads))
    for task in dict.fromkeys(r["task"] for r in rows):
        cells = {r["length"]: f"{100 * r['exact']:.1f}" for r in rows if r["task"] == task}
        lines.append(f"| {task} | " + " | ".join(cells[n] for n in heads) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=embedded(), help="directory of a model that speaks the same language")
    parser.add_argument("--tasks", nargs="+", default=list(world.TASKS), choices=world.TASKS)
    parser.add_argument("--samples", type=int, default=200, help="samples up to the trained length")
    parser.add_argument("--beyond", type=int, default=50, help="samples at 2,048 and 4,096 tokens; 0 for none")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "embedded.json")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    check_writable(args.out)

    transformers.logging.set_verbosity_error()  # the reminder that 4,096 tokens are more than the model knows
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sizes = [(n, args.samples if n <= TRAINED else args.beyond) for n in (512, TRAINED, 2 * TRAINED, 4 * TRAINED)]
    wanted = [(task, n, k) for task in args.tasks for n, k in sizes if k]
    bar = tqdm(wanted, unit="row", file=sys.stderr)
    rows = [measure(model, tokenizer, task, n, k, args.batch_tokens) for task, n, k in bar]
    result = {
        "command": " ".join(["python", "bench/embedded.py", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"transformers": transformers.__version__},
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "rows": rows,
    }
    write_whole(args.out, json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
