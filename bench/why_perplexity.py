"""Why TokenSelect's perplexity of long prose can lie above StreamingLLM's, at as many tokens read.

**Perplexity.** Passages of the bundled novel go through one cache per setting, which stops at several lengths. At each
stop the next 128 tokens are scored; each of them selects, or has a window, of its own, as in a decode step, though one
pass reads all. ``original`` settings differ from the others only in where tokens stand when they are read, and stop
within the model's trained length.

**Attention.** A passage within the trained length is read densely. For some of its last queries, in every layer and
head: how much of the true attention lies on the first tokens, on the window, and on the winners of the votes, beside
the best choice of as many tokens and as many recent ones; and what is voted for: tokens that win for at least half of
the queries whatever they ask, tokens like the query's own, and tokens behind one like it.

Runs of hours: it saves after each, and a second call goes on.

    python bench/why_perplexity.py --model SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from math import exp
from statistics import fmean, stdev
from typing import Any

import torch
from common import RESULTS, save, table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface

import kvote
from kvote import kernels
from kvote.cli.load import load
from kvote.eval import prose
from kvote.kernels import reference

SCORED = 128
PASS = 4096
# Winners and window; what else is read are the sinks and the token itself.
CHOICES = [(512, 512), (256, 1536), (512, 1024), (2048, 512)]
SINKS = 64
# Queries whose attention is looked at, one in so many of the last of a passage.
QUERIES, APART = 32, 8
NAME = "why_perplexity"


def spec_of(winners: int, window: int, positions: str = "contiguous") -> str:
    alone = f"tail={SCORED + 1}, positions='{positions}'"
    return f"tokenselect(top_k={winners}, window={window}, sinks={SINKS}, {alone})"


def settings(stops: list[int], trained: int) -> Iterator[tuple[str, str, list[int]]]:
    """Name, method and stops of every setting, the most telling first."""
    within = [stop for stop in stops if stop + SCORED < trained]
    for winners, window in CHOICES:
        size = winners + window
        yield f"{winners}+{window}", spec_of(winners, window), stops
        yield f"recent {size}", f"streamingllm(sinks={SINKS}, window={size})", stops
    for winners, window in CHOICES:
        yield f"{winners}+{window} original", spec_of(winners, window, "original"), within
    yield "dense", "dense", within


@torch.no_grad()
def scored(model: Any, method: str, ids: Tensor, stops: list[int]) -> list[dict[str, Any]]:
    """At each stop, the negative log-likelihoods of the next tokens of ``ids`` [1, n]."""
    cache, at, points = kvote.Cache(model, method), 0, []
    for stop in stops:
        begin, last = time.perf_counter(), stop + SCORED + 1
        cache.expect(stop - at, question_follows=True)
        for part in torch.split(ids[:, at:stop], PASS, dim=1):
            model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.expect(last - stop)
        logits = model(input_ids=ids[:, stop:last], past_key_values=cache, use_cache=True).logits[0, :-1]
        nll = cross_entropy(logits.float(), ids[0, stop + 1 : last], reduction="none")
        read = max(layer.tokens_read for layer in cache.report().layers)
        seconds = round(time.perf_counter() - begin, 1)
        points.append({"tokens": stop, "read": read, "seconds": seconds, "nll": [round(x, 4) for x in nll.tolist()]})
        at = last
    return points


def passages(tokenizer: Any, count: int, tokens: int) -> list[Tensor]:
    """Ids [1, tokens] of passages that begin at random sentences of the novel."""
    whole, found = prose.sentences(), []
    for i in range(count):
        start = random.Random(i).randrange(len(whole) * 3 // 5)
        ids = tokenizer(" ".join(whole[start:]), add_special_tokens=False).input_ids[:tokens]
        if len(ids) < tokens:
            raise SystemExit(f"The novel has no {tokens:,} tokens behind sentence {start:,}; give shorter stops.")
        found.append(torch.tensor([ids]))
    return found


@torch.no_grad()
def heard(model: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Queries [heads, QUERIES, d] and keys [h, n, d] of every layer, as the model rotated them, in float32."""
    queries: list[Tensor] = []
    keys: list[Tensor] = []

    def listening(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **more: Any
    ) -> Any:
        queries.append(query[0, :, -QUERIES * APART :: APART].float())
        keys.append(key[0].float())
        out, _ = kernels.attend(query, key, value, scale=scaling, causal=True)
        return out.transpose(1, 2), None

    AttentionInterface.register("listening", listening)
    own = model.config._attn_implementation
    model.set_attn_implementation("listening")
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    model.set_attn_implementation(own)
    return queries, keys


def rotated(model: Any, x: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
    """``x`` [heads, n, d] rotated to ``positions`` [n], or back from them."""
    cos, sin = (a[0, :, : x.shape[-1] // 2].float() for a in model.model.rotary_emb(x, positions[None]))
    return reference.rotate(x, cos, -sin if back else sin)


def looked_at(model: Any, ids: Tensor) -> list[dict[str, Any]]:
    """Per layer: where true attention lies and what is voted for, means over queries and heads."""
    n = ids.shape[1]
    at = torch.arange(n - QUERIES * APART, n, APART)
    same = ids[0][None, :] == ids[0][at][:, None]
    behind = torch.cat([torch.zeros(len(at), 1, dtype=torch.bool), same[:, :-1]], dim=1)
    found = []
    for layer, (query, key) in enumerate(zip(*heard(model, ids), strict=True)):
        # The last token that a query sees is its own.
        logits = reference.scores(query[None], key[None])[0] * query.shape[-1] ** -0.5
        true = logits.masked_fill(torch.arange(n) > at[:, None, None], -torch.inf).softmax(-1).mean(1)
        raw = rotated(model, query, at, back=True), rotated(model, key, torch.arange(n), back=True)
        told: dict[str, Any] = {"layer": layer, "sinks": float(true[:, :SINKS].sum(1).mean())}
        for far, near in ((512, 0), (1024, 512), (1536, 1024)):
            band = [true[i, max(SINKS, p + 1 - far) : p + 1 - near].sum() for i, p in enumerate(at.tolist())]
            told[f"{near} to {far} back"] = float(torch.stack(band).mean())
        for winners, window in CHOICES:
            edges = (at + 1 - window).tolist()
            told[f"{winners}+{window}"] = voted(model, raw, true, edges, winners, window, same, behind)
        found.append(told)
    return found


def voted(
    model: Any,
    raw: tuple[Tensor, Tensor],
    true: Tensor,
    edges: list[int],
    winners: int,
    window: int,
    same: Tensor,
    behind: Tensor,
) -> dict[str, float]:
    """What the winners of votes hold of the attention ``true`` [queries, n], and what was voted for."""
    query = rotated(model, raw[0], torch.full((raw[0].shape[1],), window))
    logits = reference.scores(query[None], raw[1][None]).narrow(-1, SINKS, max(edges) - SINKS)
    votes = reference.votes_within(logits, SINKS, edges)
    votes = votes[0] / raw[0].shape[0]
    won, best = (torch.zeros_like(votes, dtype=torch.bool) for _ in range(2))
    candidates = true[:, SINKS : max(edges)]
    won.scatter_(1, votes.topk(winners, dim=1).indices, True)
    allowed = torch.arange(SINKS, max(edges)) < torch.tensor(edges)[:, None]
    best.scatter_(1, candidates.masked_fill(~allowed, -1).topk(winners, dim=1).indices, True)
    always = won.float().mean(0) >= 0.5
    span = slice(SINKS, max(edges))
    held = {
        "held by winners": (candidates * won).sum(1),
        "held by the best as many": (candidates * best).sum(1),
        "held by as many recent": torch.stack([true[i, e - winners : e].sum() for i, e in enumerate(edges)]),
        "held by the window": torch.stack([true[i, e:].sum() for i, e in enumerate(edges)]),
        "votes for winners of half of the queries": (votes * always).sum(1),
        "winners of half of the queries": always.sum().expand(len(edges)) / winners,
        "votes for the query's token": (votes * same[:, span]).sum(1),
        "candidates that are the query's token": (same[:, span] & allowed).sum(1) / allowed.sum(1),
        "votes behind the query's token": (votes * behind[:, span]).sum(1),
    }
    return {name: round(float(value.float().mean()), 5) for name, value in held.items()}


def means(found: dict[str, Any], setting: str, lengths: list[int]) -> dict[tuple[int, int], float]:
    """Mean negative log-likelihood by passage and length."""
    points = (p for p in found["points"] if p["setting"] == setting and p["tokens"] in lengths)
    return {(p["passage"], p["tokens"]): fmean(p["nll"]) for p in points}


def beside(mine: dict[tuple[int, int], float], other: dict[tuple[int, int], float]) -> str:
    """The mean difference with its standard error, and at how many positions ``mine`` is lower."""
    apart = [value - other[at] for at, value in mine.items() if at in other]
    if len(apart) < 2:
        return ""
    lower = sum(x < 0 for x in apart)
    return f"{fmean(apart):+.3f} ± {stdev(apart) / len(apart) ** 0.5:.3f} ({lower} of {len(apart)})"


def render(found: dict[str, Any]) -> str:
    """Perplexity by setting and length, each beside as many recent tokens; and where attention lies."""
    lengths = sorted({point["tokens"] for point in found["points"]})
    near, far = lengths[:1], lengths[1:]
    rows = []
    for name in dict.fromkeys(point["setting"] for point in found["points"]):
        read = max(point["read"] for point in found["points"] if point["setting"] == name)
        cells = [means(found, name, [length]).values() for length in lengths]
        winners, _, window = name.removesuffix(" original").partition("+")
        at, other = far, f"recent {int(winners) + int(window)}" if window else ""
        if name.endswith(" original"):
            at, other = near, name.removesuffix(" original")
        apart = beside(means(found, name, at), means(found, other, at)) if other else ""
        rows.append([name, f"{read:,}", *(f"{exp(fmean(c)):.2f}" if c else "" for c in cells), apart])
    header = ["winners + window", "tokens read", *(f"{length:,}" for length in lengths), "beside it"]
    text = table(header, rows)
    layers = [layer for passage in found["attention"] for layer in passage["layers"]]
    if not layers:
        return text
    names = [f"{winners}+{window}" for winners, window in CHOICES]
    rows = [
        [part, *(f"{100 * fmean(layer[name][part] for layer in layers):.1f}" for name in names)]
        for part in layers[0][names[0]]
    ]
    rows.insert(0, ["held by the sinks", *[f"{100 * fmean(layer['sinks'] for layer in layers):.1f}"] * len(names)])
    return text + "\n\n" + table(["%", *names], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or a GGUF file")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("--stops", type=int, nargs="+", default=[4_000, 12_000, 13_000, 14_000, 15_000, 16_000])
    parser.add_argument("--looked-at", type=int, default=8_000, help="tokens of the passages whose attention is shown")
    options = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    found = json.loads(path.read_text()) if path.exists() else {"points": [], "attention": []}

    def keep() -> None:
        parts = {"dtype": options.dtype, "points": found["points"], "attention": found["attention"]}
        save(NAME, parts, by_record=True)

    loaded = load(options.model, dtype=options.dtype)
    model, trained = loaded.model, loaded.trained or 0
    texts = passages(loaded.tokenizer, options.passages, max(options.stops) + SCORED + 1)
    for i, ids in enumerate(texts):
        if all(passage["passage"] != i for passage in found["attention"]):
            layers = looked_at(model, ids[:, : options.looked_at])
            found["attention"].append({"passage": i, "tokens": options.looked_at, "layers": layers})
            keep()
        for name, method, stops in settings(options.stops, trained):
            if any((p["passage"], p["setting"]) == (i, name) for p in found["points"]):
                continue
            points = scored(model, method, ids, stops)
            found["points"] += [{"passage": i, "setting": name, **point} for point in points]
            keep()
            told = " ".join(f"{p['tokens']:,}: {torch.tensor(p['nll']).mean().exp():.2f}" for p in points)
            print(f"passage {i}, {name}, {sum(p['seconds'] for p in points):.0f} s: {told}", flush=True)
    print(render(found))


if __name__ == "__main__":
    main()
