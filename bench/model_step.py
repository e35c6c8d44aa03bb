"""One generated token, whole model: kvote's caches against transformers' own, through ``generate()``, in one run.

The shape of Llama-3.2-1B with random weights, bfloat16. N random tokens lie in the cache before anything is timed, the
same numbers in every cache; the time of a token is what passes between two tokens that ``generate()`` streams, so the
first one, with the prompt's handling, is left out. After each round a cache is rolled back to N tokens.

The baselines are transformers' default as it comes (``DynamicCache``, sdpa), the same with the query heads of one key
head packed into rows (on some processors torch's kernel is much slower if it has to share keys between heads itself),
and ``StaticCache``, which is not copied for every token. They alternate first. The fastest of them then alternates with
one kvote cache after the other, because not all fit into memory at once; ``ratio`` is against its rounds beside that
cache. Before anything is timed, what the model was fed is checked, and the first logits of every cache that is exact;
if they are wrong there are no figures. The same with 64 tokens in the cache shows what the rest of the model costs.

What ``kvote will-it-help`` predicts from the config and some seconds of measuring stands beside each cache that it
speaks of; it is measured in the same run, between transformers' caches and kvote's.

``theta=2.0`` selects anew for every token; ``theta=-1.0`` reuses one selection for all that are timed. Real texts lie
between the two; how often random weights would reuse a selection says nothing.

    python bench/model_step.py --tokens 131072
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers
from common import TokenClock, save, table
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    StaticCache,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import kvote
from kvote.errors import MethodError
from kvote.layer import Step
from kvote.measure.forecast import DEFAULT, predict
from kvote.measure.probe import measure as measure_machine
from kvote.measure.shape import shape
from kvote.method import Method
from kvote.methods import dense, tokenselect
from kvote.store.segment import Scaling

HEADS, KV_HEADS, DIM = 32, 8, 64
FEW = 64
PASS = 4096
# As it comes, transformers may take seconds per token: two steps of it a round are enough.
BASELINE_NEW = 3
# Relative errors that bfloat16 rounding leaves: in the answer of any one layer's attention to the same input (at 4,096
# tokens, a page of 64 gone from one head makes 0.04), and in the logits, where the rounding of all layers adds up.
ATTENTION_TOLERANCE = 0.01
LOGITS_TOLERANCE = 0.05
BEGIN = time.perf_counter()


@dataclass
class Contender:
    """A cache that holds ``tokens`` tokens, the attention it runs with, and how it is rolled back to them."""

    name: str
    cache: Any
    attention: str
    tokens: int
    crop: Callable[[int], None]
    held: Callable[[], int]

    def generate(self, model: Any, ids: Tensor, new: int, **options: Any) -> Any:
        """Greedy tokens after the prompt ``ids``, all of which but the last is in the cache already."""
        model.set_attn_implementation(self.attention)
        prompt = ids[:, : self.tokens + 1]
        mask = torch.ones_like(prompt)
        answer = model.generate(
            prompt, attention_mask=mask, past_key_values=self.cache, max_new_tokens=new, do_sample=False, **options
        )
        self.crop(int(self.cache.get_seq_length()) - self.tokens)
        return answer

    def round(self, model: Any, ids: Tensor, new: int) -> float:
        """Seconds per token, the median of one run."""
        clock = TokenClock()
        self.generate(model, ids, new, streamer=clock)
        return median(clock.steps[1:])


def sdpa_packed(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa, but in a decode step the query heads of one key head are its rows; nothing is repeated."""
    b, heads, t, d = query.shape
    if t > 1 or attention_mask is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = query.reshape(b, key.shape[1], heads // key.shape[1], d)
    out = torch.nn.functional.scaled_dot_product_attention(rows, key, value, scale=kwargs.get("scaling"))
    return out.reshape(b, 1, heads, value.shape[-1]), None


def build_model(layers: int) -> Any:
    """The geometry of Llama-3.2-1B, with random weights."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    # Random weights end a text at random.
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model


def static_cache(config: Any, n: int, new: int) -> Contender:
    """Random keys and values: every other cache gets its numbers from this one."""
    cache = StaticCache(config=config, max_cache_len=n + new)
    for layer in cache.layers:
        layer.update(*torch.randn(2, 1, KV_HEADS, n, DIM, dtype=torch.bfloat16))

    def crop(columns: int) -> None:
        for layer in cache.layers:
            layer.cumulative_length.sub_(columns)

    return Contender("StaticCache, sdpa", cache, "sdpa", n, crop, lambda: tensor_bytes(cache))


def dynamic_cache(config: Any, source: Contender) -> Contender:
    n, cache = source.tokens, DynamicCache(config=config)
    for index, layer in enumerate(source.cache.layers):
        cache.update(layer.keys[:, :, :n], layer.values[:, :, :n], index)
    crop, held = (lambda columns: cache.crop(-columns)), (lambda: tensor_bytes(cache))
    return Contender("DynamicCache, sdpa (as it comes)", cache, "sdpa", n, crop, held)


def kvote_cache(method: Any, model: Any, source: Contender) -> Contender:
    """A cache that holds the tokens of ``source`` as if a prompt of that length had been announced and prefilled."""
    n = source.tokens
    model.set_attn_implementation("sdpa")
    cache = kvote.Cache(model, method)
    cache.expect(n)
    for layer, given in zip(cache.managed, source.cache.layers, strict=True):
        for start in range(0, n, PASS):
            key, value = (x[:, :, start : min(n, start + PASS)] for x in (given.keys, given.values))
            positions = torch.arange(start, start + key.shape[2])[None]
            query = key[:, :, :1].repeat_interleave(HEADS // KV_HEADS, 1)
            segment = layer.start(Step(query, key, value, positions, None, 0, Scaling(DIM**-0.5)))
            raw = key if segment.rope is None else segment.rope.undo(key, segment.rope.angles(positions, key.dtype))
            segment.append([0], raw, value, positions)
        layer.seen = n
    name = model.config._attn_implementation
    return Contender(f"kvote {method.spec}", cache, name, n, lambda columns: cache.crop(-columns), cache.nbytes)


def tensor_bytes(cache: Any) -> int:
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))


@dataclass
class Trace:
    """The first generated token: its logits, and what went into and came out of each layer's attention."""

    logits: Tensor
    inputs: list[Tensor]
    outputs: list[Tensor]

    @classmethod
    def of(cls, contender: Contender, model: Any, ids: Tensor, given: list[Tensor] | None = None) -> "Trace":
        """With ``given``, layers get these inputs instead of what the layers before them made, so errors do not add up.

        Stops if the model is fed anything but one token a step, at its place.
        """
        fed: list[tuple[int, list[int]]] = []
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []
        attentions = [layer.self_attn for layer in model.model.layers]

        def before(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if module is attentions[0]:
                fed.append((kwargs["hidden_states"].shape[1], kwargs["position_ids"].flatten().tolist()))
            if given is not None and len(inputs) < len(given):
                kwargs["hidden_states"] = given[len(inputs)]
            inputs.append(kwargs["hidden_states"])
            return args, kwargs

        def after(module: Any, args: Any, out: Any) -> None:
            outputs.append(out[0].float())

        hooks = [attention.register_forward_pre_hook(before, with_kwargs=True) for attention in attentions]
        hooks += [attention.register_forward_hook(after) for attention in attentions]
        answer = contender.generate(model, ids, 2, return_dict_in_generate=True, output_logits=True)
        for hook in hooks:
            hook.remove()
        n, layers = contender.tokens, len(attentions)
        if fed != [(1, [n]), (1, [n + 1])]:
            raise SystemExit(f"{contender.name}: the model was fed {fed} (tokens, positions) behind {n}; no figures.")
        return cls(answer.logits[0].float(), inputs[:layers], outputs[:layers])


def checked(contender: Contender, model: Any, ids: Tensor, expected: Trace) -> dict[str, float]:
    """How far an exact cache is from the default. Stops if that is more than rounding."""
    free = Trace.of(contender, model, ids)
    led = Trace.of(contender, model, ids, expected.inputs)
    layers = [error(mine, theirs) for mine, theirs in zip(led.outputs, expected.outputs, strict=True)]
    errors = {"logits": error(free.logits, expected.logits), "attention": max(layers)}
    if errors["logits"] > LOGITS_TOLERANCE or errors["attention"] > ATTENTION_TOLERANCE:
        raise SystemExit(f"{contender.name} is off by {errors} (relative to the default); no figures.")
    return errors


def error(mine: Tensor, expected: Tensor) -> float:
    return ((mine - expected).norm() / expected.norm()).item()


def alternate(contenders: list[Contender], model: Any, ids: Tensor, rounds: int, new: int) -> list[list[float]]:
    """Seconds per token of every round, for each contender."""
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for spent, contender in zip(times, contenders, strict=True):
            spent.append(contender.round(model, ids, new))
    return times


def figures(
    contender: Contender, full: list[float], few: list[float], errors: dict[str, float] | None
) -> dict[str, Any]:
    return {
        "cache": contender.name,
        "ms": 1000 * median(full),
        "spread_ms": [1000 * min(full), 1000 * max(full)],
        "ms_with_few_tokens": 1000 * median(few),
        "bytes": contender.held(),
        "errors": errors,
        "rounds_ms": [1000 * seconds for seconds in full],
    }


def methods() -> list[Any]:
    """The kvote methods compared, with the sketches that this version has."""
    select = partial(tokenselect, top_k=2048, sinks=128, window=512)
    found: dict[str, Any] = {}
    for sketch in ("none", "int8", "int4"):
        with suppress(MethodError):
            found[sketch] = select(theta=2.0, sketch=sketch)
    return [dense(), *found.values(), select(theta=-1.0, sketch=list(found)[-1])]


def predictions(config: Any, tokens: int, asked: list[Method]) -> dict[str, float]:
    """Milliseconds per token that ``kvote will-it-help`` predicts, by the spec of a method or ``DEFAULT``."""
    model = shape(config)
    machine = measure_machine(model, tokens, [method for method in asked if method.spec != "dense"], 1, say)
    predicted = [predict(model, tokens, method, machine) for method in asked]
    found = {each.method.cache: 1000 * each.method.seconds for each in predicted}
    return {DEFAULT: 1000 * predicted[0].default.seconds, **found}


def activity(cache: kvote.Cache) -> dict[str, int]:
    """What a layer read for the last token, and how often layers selected and reused a selection."""
    layers = cache.report().layers
    read = max(layer.tokens_read for layer in layers)
    selections, reused = (sum(getattr(layer, name) for layer in layers) for name in ("selections", "reused"))
    return {"tokens_read": read, "selections": selections, "reused": reused}


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    model = build_model(options.layers)
    config, sizes = model.config, (options.tokens, FEW)
    ids = torch.randint(config.vocab_size, (1, options.tokens + 1))
    say("filling transformers' caches")
    static = [static_cache(config, n, max(options.new, BASELINE_NEW)) for n in sizes]
    dynamic = [dynamic_cache(config, source) for source in static]
    packed = [replace(c, name="DynamicCache, sdpa packed", attention="sdpa_packed") for c in dynamic]
    baselines = [dynamic, packed, static]
    expected = Trace.of(dynamic[0], model, ids)
    errors = [None, *(checked(contender, model, ids, expected) for contender in (packed[0], static[0]))]
    say("timing transformers' caches")
    full, few = ([pair[i] for pair in baselines] for i in range(2))
    times, few_times = (alternate(group, model, ids, options.rounds, BASELINE_NEW) for group in (full, few))
    results = [figures(*measured) for measured in zip(full, times, few_times, errors, strict=True)]
    strongest = min(range(len(baselines)), key=lambda i: results[i]["ms"])
    best, best_ms, default_ms = full[strongest], results[strongest]["ms"], results[0]["ms"]
    for result in results:
        result.update(ratio=best_ms / result["ms"], ratio_as_it_comes=default_ms / result["ms"])
    # Memory for one kvote cache beside the source of all numbers and the strongest baseline.
    del dynamic, packed, baselines, full
    # A step that reuses its selection is not what will-it-help predicts: it speaks of one that selects.
    expected_ms = predictions(config, options.tokens, methods()[:-1])
    results[0]["predicted_ms"] = expected_ms[DEFAULT]
    for method in methods():
        say(f"filling and timing {method.spec}")
        mine, mine_few = (kvote_cache(method, model, source) for source in static)
        off = None
        if method == dense():
            off = checked(mine, model, ids, expected)
        else:
            Trace.of(mine, model, ids)
        beside, spent = alternate([best, mine], model, ids, options.rounds, options.new)
        (spent_few,) = alternate([mine_few], model, ids, options.rounds, options.new)
        result = figures(mine, spent, spent_few, off) | activity(mine.cache)
        result["baseline_ms"] = 1000 * median(beside)
        result["ratio"] = result["baseline_ms"] / result["ms"]
        # The default is too slow to run beside every cache: its ratio goes through the strongest baseline.
        result["ratio_as_it_comes"] = result["ratio"] * default_ms / best_ms
        if method.spec in expected_ms:
            result["predicted_ms"] = expected_ms[method.spec]
        results.append(result)
        del mine, mine_few
    return results


def say(what: str) -> None:
    print(f"{time.perf_counter() - BEGIN:6.0f} s  {what}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=131_072, help="tokens in the cache before generation")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=4, help="tokens generated per round; the first is not timed")
    parser.add_argument("--layers", type=int, default=16)
    options = parser.parse_args()
    if options.new < 2:
        parser.error("--new must be at least 2: the first token is not timed.")
    transformers.logging.set_verbosity_error()
    AttentionInterface.register("sdpa_packed", sdpa_packed)
    AttentionMaskInterface.register("sdpa_packed", sdpa_mask)
    torch.manual_seed(0)
    with torch.no_grad():
        results = measure(options)
    header = ["cache", "ms/token", "predicted", "spread", f"with {FEW} tokens", "ratio", "as it comes", "MiB", "reads"]
    rows = [
        [
            r["cache"],
            f"{r['ms']:.1f}",
            f"{r['predicted_ms']:.1f} ({r['predicted_ms'] / r['ms'] - 1:+.0%})" if "predicted_ms" in r else "",
            "{:.1f} to {:.1f}".format(*r["spread_ms"]),
            f"{r['ms_with_few_tokens']:.1f}",
            f"{r['ratio']:.2f}x",
            f"{r['ratio_as_it_comes']:.2f}x",
            f"{r['bytes'] / 2**20:,.0f}",
            f"{r['tokens_read']:,}" if "tokens_read" in r else "",
        ]
        for r in results
    ]
    print(table(header, rows))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{options.tokens:,} tokens, {options.layers} layers; at most {peak / 2**30:.1f} GiB of memory")
    shape = {"layers": options.layers, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "weights": "random"}
    save(
        f"model_step-{options.tokens}",
        {"shape": shape, "tokens": options.tokens, "few_tokens": FEW, "peak_bytes": peak, "results": results},
    )


if __name__ == "__main__":
    main()
