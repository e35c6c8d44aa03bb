"""How much attention the winners of TokenSelect's votes hold when the votes come from a sketch of the keys.

Documents go through a model, and the queries that select at their end are kept: of the embedded model while it is asked
questions, of a real one (``--model``) at the last tokens of a passage of the bundled novel. Each votes on the same
candidates from the keys themselves and from every kind of sketch. A token's attention is its share of
softmax(scale * q.k) over all candidates [sinks, edge), head by head, averaged over heads, query and keys standing where
TokenSelect scores them; ``mass`` is the attention of the ``top_k`` winners. ``lost``: points of it that a sketch gives
away against exact votes (votes are not scaled, so it can be negative); ``votes lost``: points of all votes;
``shared``: winners in common with exact votes.

``int4`` nominates four times as many tokens as are read, which are scored again with their keys, as the method does;
``int4 alone`` is trusted. Tried in torch alone: ``int4 as it is``, of keys that are not less their centre, and
``int2``, two bits a channel (the levels that are best for a bell curve) of centred keys after a random rotation, which
nominates 4, 8 and 16 times as many.

    python bench/recall.py
    python bench/recall.py --model SmolLM2-135M-Instruct.Q4_1.gguf --tokens 8000
"""

import argparse
import random
from dataclasses import dataclass, field, fields, replace
from statistics import fmean
from typing import Any, NamedTuple

import torch
from common import load_embedded, save, table
from torch import Tensor

import kvote
from kvote.cli.load import load
from kvote.eval import prose
from kvote.index.sketch import SketchIndex
from kvote.kernels import reference
from kvote.kernels.lanes import PAGE
from kvote.method import Method
from kvote.models import world
from kvote.models.presets import preset
from kvote.read.head_votes import SKETCHES, HeadVotes
from kvote.read.reader import Reading
from kvote.spec import parse
from kvote.store.uncompressed import UncompressedSegment

ROOM = 48  # tokens left for a question and its answer
QUESTIONS = 8
TOP_K = [64, 512, 2048]
LAST = 32  # tokens of a passage that select
# What votes, how many times as many tokens it nominates as are read, and how many it nominates at least.
WAYS = {
    "exact": ("none", 0, 0),
    "int8": ("int8", 0, 0),
    "int4": ("int4", 4, 0),
    "int4, 4,096 at least": ("int4", 4, 4096),
    "int4 alone": ("int4", 0, 0),
}
TRIED = {"int4 as it is": (4, False, 4), **{f"int2, {times} times": (2, True, times) for times in (4, 8, 16)}}
# Levels of two bits for numbers from a bell curve of width 1, and what lies midway.
LEVELS, MIDWAY = torch.tensor([-1.51, -0.4528, 0.4528, 1.51]), torch.tensor([-0.9816, 0.0, 0.9816])


class Heard(NamedTuple):
    """A query [heads, d] as TokenSelect scores it, and the slot where its candidates end."""

    query: Tensor
    edge: int


@dataclass(frozen=True)
class Listening(HeadVotes):
    """Head votes that remember, layer by layer, what selected."""

    heard: dict[int, list[Heard]] = field(default_factory=dict, compare=False)

    def _select(self, reading: Reading, query: Tensor, edges: list[int]) -> Tensor:
        new = [Heard(query[0, :, j].clone(), edge) for j, edge in enumerate(edges)]
        self.heard.setdefault(reading.layer, []).extend(new)
        return super()._select(reading, query, edges)


Listened = tuple[list[UncompressedSegment], dict[int, list[Heard]], int]


def listening(spec: str) -> tuple[Method, Listening]:
    method = parse(spec)
    reader = Listening(**{part.name: getattr(method.read, part.name) for part in fields(method.read)})
    return replace(method, read=reader), reader


def listen(model: Any, tokenizer: Any, tokens: int, seed: int) -> Listened:
    """The layers of a document's cache, what selected while it was asked its questions, and the first candidate."""
    method, reader = listening(preset("tokenselect"))
    sample = world.sample("needle", tokens - ROOM, seed=1_000_000 + seed, facts=QUESTIONS, questions=QUESTIONS)
    document = kvote.Document(model, tokenizer, sample.document, method)
    reader.heard.clear()
    for question in sample.questions:
        document.ask(question.prompt, max_new_tokens=4)
    return [layer.segment for layer in document.cache.managed], reader.heard, reader.sinks


@torch.no_grad()
def listen_to_prose(model: Any, tokenizer: Any, tokens: int, seed: int) -> Listened:
    """The same of the last tokens of a passage that begins at a random sentence."""
    method, reader = listening("tokenselect(top_k=512, window=512, sinks=64)")
    whole = prose.sentences()
    start = random.Random(seed).randrange(len(whole) * 3 // 5)
    ids = tokenizer(" ".join(whole[start:]), add_special_tokens=False, return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise SystemExit(f"The novel has no {tokens:,} tokens behind sentence {start:,}; give fewer --tokens.")
    cache = kvote.Cache(model, method)
    cache.expect(tokens - LAST, question_follows=True)
    parts = [*torch.split(ids[:, :-LAST], 4096, dim=1), ids[:, -LAST:]]
    for part in parts:
        reader.heard.clear()
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return [layer.segment for layer in cache.managed], reader.heard, reader.sinks


def stored(source: UncompressedSegment, kind: str) -> UncompressedSegment:
    """The keys and values of ``source`` once more, with a sketch of that kind beside them."""
    key, value = source.decode([0], 0, source.length(0))
    bits = SKETCHES[kind]
    segment = UncompressedSegment(source.heads, key, value.shape[-1], source.rope)
    segment.add_sequences(1)
    if bits:
        segment.add_index(SketchIndex(bits), 0)
    if len(segment.indexes) != bool(bits):
        raise SystemExit(f"{kind}: sketches need the compiled kernels; `kvote env` says why they do not run.")
    segment.append([0], key, value, source.positions(0)[0][None].long())
    return segment


def attention(query: Tensor, key: Tensor) -> Tensor:
    """Attention on each key [h, n, d] of a query [heads, d]: the average over heads, [n]."""
    logits = reference.scores(query[None, :, None], key[None])[0, 0]
    return torch.softmax(logits * query.shape[-1] ** -0.5, dim=-1).mean(dim=0)


def two_bits(key: Tensor) -> Tensor:
    """What two bits per channel, with one scale per token, keep of keys [..., d]."""
    turn = torch.linalg.qr(torch.randn(key.shape[-1], key.shape[-1], generator=torch.Generator().manual_seed(0)))[0]
    rotated = key.float() @ turn
    scale = rotated.square().mean(-1, keepdim=True).sqrt().half().float()
    codes = torch.bucketize(rotated / scale.clamp_min(1e-30), MIDWAY)
    return LEVELS[codes] * scale @ turn.T


def judge(segment: UncompressedSegment, heard: list[Heard], sinks: int) -> list[Any]:
    """Per query, [top_k][way to vote]: mass of the winners, their votes, and the share of the exact winners in them."""
    segments = {kind: stored(segment, kind) for kind in SKETCHES}
    key = segment.decode([0], 0, segment.length(0))[0][0]
    centre = reference.centre(key, PAGE)
    kept = {
        name: reference.sketched(key, bits) if not centred else two_bits(key - centre)
        for name, (bits, centred, _) in TRIED.items()
        if name in ("int4 as it is", "int2, 4 times")
    }
    results = []
    for query, edge in heard:
        mass = attention(query, key[:, sinks:edge])
        votes = soft_votes(query, key[:, sinks:edge])
        coded = reference.sketched_query(query)
        rough = {name: soft_votes(coded, tokens[:, sinks:edge]) for name, tokens in kept.items()}
        row = []
        for k in TOP_K:
            found = []
            for kind, times, least in WAYS.values():
                nominate = max(least, times * k)
                held, more = segments[kind], [nominate] if nominate else []
                voted = held.indexes.get("sketch", held)
                chosen = voted.winners(query[None, :, None], [0], sinks, [edge], k, *more)
                found.append(chosen[0, 0] - sinks)
            for name, (_, _, times) in TRIED.items():
                nominees = rough.get(name, rough["int2, 4 times"]).topk(min(times * k, edge - sinks)).indices
                found.append(nominees[votes[nominees].topk(k).indices])
            exact = found[0]
            row.append([[float(mass[i].sum()), float(votes[i].sum()), shared(exact, i)] for i in found])
        results.append(row)
    return results


def shared(exact: Tensor, found: Tensor) -> float:
    return float(torch.isin(exact, found).float().mean())


def soft_votes(query: Tensor, key: Tensor) -> Tensor:
    """Votes [n] of a query [heads, d] on keys [h, n, d], which sum to 1."""
    return reference.soft_votes(reference.scores(query[None, :, None], key[None]))[0, 0] / len(query)


def summary(layer: int, names: list[str], results: Tensor, documents: int) -> list[dict[str, Any]]:
    """One entry per top_k and way to vote, from ``results`` [queries, top_k, ways, (mass, votes, shared)]."""
    entries = []
    for i, k in enumerate(TOP_K):
        exact = results[:, i, 0, 0]
        for j, name in enumerate(names):
            mass, votes, same = results[:, i, j].unbind(-1)
            by_document = (exact - mass).reshape(documents, -1).mean(dim=1)
            entry = {
                "layer": layer,
                "top_k": k,
                "votes": name,
                "mass_percent": mass.mean(),
                "points_lost": (exact - mass).mean(),
                "points_lost_worst_document": by_document.max(),
                "points_lost_worst_query": (exact - mass).max(),
                "votes_lost": (results[:, i, 0, 1] - votes).mean(),
                "shared_percent": same.mean(),
            }
            entries.append({n: round(100 * float(v), 3) if isinstance(v, Tensor) else v for n, v in entry.items()})
    return entries


def render(entries: list[dict[str, Any]]) -> str:
    layers = sorted({entry["layer"] for entry in entries})
    names = list(dict.fromkeys(entry["votes"] for entry in entries))
    rows = []
    for k in TOP_K:
        for name in names:
            here = [next(e for e in entries if (e["layer"], e["top_k"], e["votes"]) == (n, k, name)) for n in layers]
            lost = [f"{e['points_lost']:+.2f} ({e['shared_percent']:.0f}%)" for e in here]
            mass = [f"{e['mass_percent']:.1f}" for e in here]
            rows.append([f"{k:,}", name, *(mass if name == "exact" else lost)])
    return table(["top_k", "votes from", *(f"layer {n}" for n in layers)], rows)


def render_mean(entries: list[dict[str, Any]]) -> str:
    """Over all layers, which a real model has many of: mean and worst."""
    rows = []
    for k in TOP_K:
        for name in dict.fromkeys(entry["votes"] for entry in entries):
            here = [e for e in entries if (e["top_k"], e["votes"]) == (k, name)]
            rows.append([f"{k:,}", name, f"{fmean(e['mass_percent'] for e in here):.1f}"])
            for part in ("points_lost", "votes_lost"):
                rows[-1] += [f"{fmean(e[part] for e in here):.3f}", f"{max(e[part] for e in here):.3f}"]
            rows[-1].append(f"{fmean(e['shared_percent'] for e in here):.1f}")
    heads = ["mass, %", "mass lost", "in the worst layer", "votes lost", "in the worst layer", "winners shared, %"]
    return table(["top_k", "votes from", *heads], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a GGUF file; default: the embedded model")
    parser.add_argument("--dtype", default="bfloat16", help="of --model")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--every", type=int, default=1, help="judges one layer in so many")
    options = parser.parse_args()
    if options.model is None:
        (model, tokenizer), hear, name = load_embedded(), listen, "recall"
    else:
        loaded = load(options.model, dtype=options.dtype)
        model, tokenizer, hear, name = loaded.model, loaded.tokenizer, listen_to_prose, f"recall-real-{options.tokens}"
    results: dict[int, list[Any]] = {}
    for seed in range(options.documents):
        segments, heard, sinks = hear(model, tokenizer, options.tokens, seed)
        for layer, segment in list(enumerate(segments))[options.every // 2 :: options.every]:
            results.setdefault(layer, []).extend(judge(segment, heard[layer], sinks))
    entries = []
    for layer, rows in results.items():
        entries += summary(layer, [*WAYS, *TRIED], torch.tensor(rows), options.documents)
    queries = len(next(iter(results.values())))
    print(f"{queries} queries per layer. Exact votes: mass, %. Sketches: points lost (winners shared).")
    print(render(entries) if options.model is None else render_mean(entries))
    save(name, {"tokens": options.tokens, "documents": options.documents, "queries": queries, "entries": entries})


if __name__ == "__main__":
    main()
