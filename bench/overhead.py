"""What kvote itself takes of a decode step: where few tokens are held, all else is short.

Times the decode step of a tiny one-layer Llama that holds 64 tokens with kvote, and the same step with transformers'
DynamicCache and sdpa, in turn in one run; both caches are cropped back outside the clock. The difference of the
medians is kvote's overhead per layer and step. TokenSelect reads 4 sinks, 16 winners and a window of 16 tokens, and
selects anew in every step: its counters are shown, and a step that reused a selection ends the run.

    python bench/overhead.py
"""

import argparse
import time
from statistics import median
from typing import Any

import torch
from common import save, table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvote

TOKENS, STEPS, VOCABULARY = 64, 8, 256
METHODS = {
    "dense": "dense",
    "tokenselect": "tokenselect(top_k=16, sinks=4, window=16)",
    "tokenselect without its selection cache": "tokenselect(top_k=16, sinks=4, window=16, theta=2)",
}


def tiny() -> LlamaForCausalLM:
    """One layer of random weights: 4 query heads and 2 key heads of 16 channels."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


class Subject:
    """A model, and a cache that holds ``TOKENS`` tokens between the rounds."""

    def __init__(self, method: str | None, prompt: torch.Tensor) -> None:
        """``method`` None: DynamicCache."""
        self.model = tiny()
        self.cache: Any = DynamicCache(config=self.model.config)
        if method is not None:
            self.cache = kvote.Cache(self.model, method)
        self.seconds: list[float] = []
        self.selections = self.reused = 0
        self.step(prompt, clock=False)

    @property
    def activity(self) -> Any:
        return self.cache.managed[0].activity

    def step(self, ids: torch.Tensor, *, clock: bool = True) -> torch.Tensor:
        begin = time.perf_counter()
        logits = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        if clock:
            self.seconds.append(time.perf_counter() - begin)
        return logits

    def back(self) -> None:
        """Back to ``TOKENS`` tokens."""
        self.cache.crop(TOKENS - self.cache.get_seq_length())


def measure(rounds: int) -> dict[str, Any]:
    prompt = torch.randint(VOCABULARY, (1, TOKENS))
    subjects = {name: Subject(spec, prompt) for name, spec in METHODS.items()}
    native = Subject(None, prompt)
    everyone = [native, *subjects.values()]
    started = {name: (own.activity.selections, own.activity.reused) for name, own in subjects.items()}
    for number in range(rounds + 5):
        # Whoever comes second finds the processor's caches as the first has left them, so all take every place.
        turns = everyone[number % len(everyone) :] + everyone[: number % len(everyone)]
        # The same token twice would be the same query, whose selection is reused.
        for token in torch.randperm(VOCABULARY)[:STEPS].view(-1, 1, 1):
            answers = {id(own): own.step(token, clock=number >= 5) for own in turns}
            # No figures of wrong answers.
            torch.testing.assert_close(answers[id(subjects["dense"])], answers[id(native)], atol=1e-5, rtol=1e-4)
        for own in everyone:
            own.back()
    steps = STEPS * (rounds + 5)
    baseline = 1e6 * median(native.seconds)
    results = {}
    for name, own in subjects.items():
        selected, reused = (
            now - then for now, then in zip((own.activity.selections, own.activity.reused), started[name], strict=True)
        )
        if name != "dense" and (selected != steps or reused):
            raise SystemExit(f"{name} selected {selected} times and reused {reused} selections in {steps} steps.")
        pairs = [1e6 * (mine - its) for mine, its in zip(own.seconds, native.seconds, strict=True)]
        results[name] = {
            "method": METHODS[name],
            "microseconds": round(1e6 * median(own.seconds), 1),
            "overhead_microseconds": round(1e6 * median(own.seconds) - baseline, 1),
            "median_of_differences_microseconds": round(median(pairs), 1),
            "quartiles_of_differences_microseconds": [round(q, 1) for q in _quartiles(pairs)],
            "overhead_of_undisturbed_steps_microseconds": round(
                1e6 * (_tenth(own.seconds) - _tenth(native.seconds)), 1
            ),
            "steps": steps,
            "selections": selected,
            "reused": reused,
        }
        kvote.detach(own.model)
    return {
        "tokens": TOKENS,
        "steps_per_round": STEPS,
        "rounds": rounds,
        "dynamic_cache_microseconds": round(baseline, 1),
        "results": results,
    }


def _tenth(values: list[float]) -> float:
    """What a tenth of the steps come in below: those that nothing else on the machine has disturbed."""
    return sorted(values)[len(values) // 10]


def _quartiles(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        result = measure(options.rounds)
    rows = [
        [
            name,
            f"{r['microseconds']:.0f}",
            f"{r['overhead_microseconds']:.0f}",
            f"{r['median_of_differences_microseconds']:.0f}",
            f"{r['overhead_of_undisturbed_steps_microseconds']:.0f}",
            "{:.0f} to {:.0f}".format(*r["quartiles_of_differences_microseconds"]),
            f"{r['selections']} of {r['steps']}",
        ]
        for name, r in result["results"].items()
    ]
    print(f"DynamicCache and sdpa: {result['dynamic_cache_microseconds']:.0f} µs a step")
    print(
        table(
            ["method", "µs a step", "overhead", "median of differences", "undisturbed", "quartiles", "selections"], rows
        )
    )
    if not options.no_save:
        print(save("overhead", result))


if __name__ == "__main__":
    main()
