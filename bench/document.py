"""One long document, whole process: TokenSelect against transformers' default cache with sdpa, in one run.

Reads the same document with both, in passes of the same size, and generates the same number of tokens; rounds
alternate and medians are compared. The answer of each is printed: speed is worth nothing without it.

    python bench/document.py --tokens 65536 --rounds 3
"""

import argparse
import time
from statistics import median
from typing import Any

import torch
from common import load_embedded, save, table
from transformers import DynamicCache

import kvote
from kvote.models import world
from kvote.models.presets import preset

NEW = 16


def default_cache(model: Any, ids: torch.Tensor, question: torch.Tensor, step: int) -> dict[str, Any]:
    """Prefill and greedy decoding as plain transformers code does it: DynamicCache and sdpa."""
    model.set_attn_implementation("sdpa")
    cache = DynamicCache(config=model.config)
    begin = time.perf_counter()
    with torch.no_grad():
        for start in range(0, ids.shape[1], step):
            model(input_ids=ids[:, start : start + step], past_key_values=cache, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - begin
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    tokens, seconds = decode(model, cache, question)
    return {"prefill": prefill, "ms": 1000 * seconds, "bytes": held, "tokens": tokens}


def kvote_cache(method: str, model: Any, ids: torch.Tensor, question: torch.Tensor, step: int) -> dict[str, Any]:
    cache = kvote.Cache(model, preset(method))
    cache.expect(ids.shape[1], question_follows=True)
    begin = time.perf_counter()
    with torch.no_grad():
        for start in range(0, ids.shape[1], step):
            model(input_ids=ids[:, start : start + step], past_key_values=cache, use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - begin
    held = cache.nbytes()
    tokens, seconds = decode(model, cache, question)
    return {"prefill": prefill, "ms": 1000 * seconds, "bytes": held, "tokens": tokens}


def decode(model: Any, cache: Any, question: torch.Tensor) -> tuple[list[int], float]:
    """Greedy tokens after the question, and the median time of a step (the first, with the question, left out)."""
    tokens, times = [], []
    step = question
    with torch.no_grad():
        for _ in range(NEW):
            begin = time.perf_counter()
            logits = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            step = logits[:, -1].argmax(-1, keepdim=True)
            times.append(time.perf_counter() - begin)
            tokens.append(int(step))
    return tokens, median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pass-tokens", type=int, default=4096)
    options = parser.parse_args()
    model, tokenizer = load_embedded()
    sample = world.sample("needle", options.tokens, seed=7)
    ids = tokenizer(sample.document, return_tensors="pt").input_ids
    asked = sample.questions[0]
    question = tokenizer(asked.prompt, return_tensors="pt", add_special_tokens=False).input_ids
    warm = ids[:, :8192]
    runs: dict[str, list[dict[str, Any]]] = {}
    default_cache(model, warm, question, options.pass_tokens)
    kvote_cache("tokenselect", model, warm, question, options.pass_tokens)
    for _ in range(options.rounds):
        runs.setdefault("transformers, sdpa", []).append(default_cache(model, ids, question, options.pass_tokens))
        for method in ("dense", "tokenselect"):
            runs.setdefault(f"kvote {method}", []).append(
                kvote_cache(method, model, ids, question, options.pass_tokens)
            )
    base = runs["transformers, sdpa"]
    rows, results = [], []
    for name, group in runs.items():
        prefill, ms = (median(run[key] for run in group) for key in ("prefill", "ms"))
        base_prefill, base_ms = (median(run[key] for run in base) for key in ("prefill", "ms"))
        text = tokenizer.decode(group[0]["tokens"]).split("<eot>")[0].strip()
        result = {
            "name": name,
            "prefill_s": prefill,
            "prefill_ratio": base_prefill / prefill,
            "ms_per_token": ms,
            "decode_ratio": base_ms / ms,
            "kv_mib": group[0]["bytes"] / 2**20,
            "answer": "right" if text == asked.answer else "wrong",
        }
        results.append({**result, "runs": group})
        rows.append([f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in result.values()])
    print(table(["cache", "prefill s", "ratio", "ms/token", "ratio", "KV MiB", "answer"], rows))
    save(f"document-{options.tokens}", {"tokens": options.tokens, "rounds": options.rounds, "results": results})


if __name__ == "__main__":
    main()
