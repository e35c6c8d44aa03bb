"""How often the selection cache is hit: decode steps of the embedded model on a long document, layer by layer.

Asks a document of 65,536 tokens and goes on generating, and notes for every step and layer whether its query selected
anew or resembled the last selecting one (cosine >= theta) and reused its tokens. bench/decode_step.py replays the
decisions of theta = 0.9 at the geometry of an 8B model.

    python bench/reuse.py
"""

import argparse
from typing import Any

import torch
from common import load_embedded, save, table

import kvote
from kvote.models import world
from kvote.models.presets import PRESETS


def decisions(model: Any, tokenizer: Any, tokens: int, steps: int, theta: float) -> list[str]:
    """Per layer, one character a step: ``h`` where the selection was reused, ``m`` where it was made anew."""
    sample = world.sample("needle", tokens, seed=7)
    ids = tokenizer(sample.document, return_tensors="pt").input_ids
    question = tokenizer(sample.questions[0].prompt, return_tensors="pt", add_special_tokens=False).input_ids
    parameters = ", ".join(f"{k}={v!r}" for k, v in {**PRESETS["tokenselect"], "theta": theta}.items())
    cache = kvote.Cache(model, f"tokenselect({parameters})")
    cache.expect(ids.shape[1], question_follows=True)
    with torch.no_grad():
        for start in range(0, ids.shape[1], 4096):
            model(input_ids=ids[:, start : start + 4096], past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = model(input_ids=question, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        seen = [layer.activity.reused for layer in cache.managed]
        told = ["" for _ in cache.managed]
        for _ in range(steps):
            token = logits[:, -1].argmax(-1, keepdim=True)
            logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            now = [layer.activity.reused for layer in cache.managed]
            told = [t + ("h" if b > a else "m") for t, a, b in zip(told, seen, now, strict=True)]
            seen = now
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--theta", nargs="+", type=float, default=[0.7, 0.8, 0.9, 0.95])
    options = parser.parse_args()
    model, tokenizer = load_embedded()
    results = []
    for theta in options.theta:
        told = decisions(model, tokenizer, options.tokens, options.steps, theta)
        rates = [layer.count("h") / len(layer) for layer in told]
        results.append({"theta": theta, "hit_rate": rates, "decisions": told})
    rows = [[f"{r['theta']:g}", *(f"{100 * x:.0f}%" for x in r["hit_rate"])] for r in results]
    print(table(["theta", *(f"layer {i}" for i in range(len(results[0]["hit_rate"])))], rows))
    save("reuse", {"tokens": options.tokens, "steps": options.steps, "results": results})


if __name__ == "__main__":
    main()
