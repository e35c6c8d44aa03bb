"""How much attention the winners of TokenSelect's votes hold when the votes come from a sketch of the keys.

Documents go through the embedded model, questions are asked, and the queries that select are kept. Each votes on the
same candidates from the keys themselves and from every kind of sketch. A token's attention is its share of
softmax(scale * q.k) over all candidates [sinks, edge), head by head, averaged over heads, query and keys standing where
TokenSelect scores them; ``mass`` is the attention of the ``top_k`` winners. ``lost``: points of it that a sketch gives
away against exact votes (votes are not scaled, so it can be negative); ``shared``: winners in common with exact votes.
``int4`` nominates tokens that are scored again with their keys, as the method does; ``int4 alone`` is trusted.

    python bench/recall.py
"""

import argparse
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from common import load_embedded, save, table
from torch import Tensor

import kvote
from kvote.index.sketch import SketchIndex
from kvote.kernels import reference
from kvote.models import world
from kvote.models.presets import preset
from kvote.read.head_votes import SKETCHES, HeadVotes
from kvote.read.tokens import Reading
from kvote.spec import parse
from kvote.store.raw import RawSegment

ROOM = 48  # tokens left for a question and its answer
QUESTIONS = 8
TOP_K = [64, 512, 2048]
# What votes, and whether its nominees are scored again.
WAYS = {"exact": ("none", False), "int8": ("int8", False), "int4": ("int4", True), "int4 alone": ("int4", False)}
PARAMETERS = {field.name: getattr(parse("tokenselect").read, field.name) for field in fields(HeadVotes)}


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


def listen(model: Any, tokenizer: Any, tokens: int, seed: int) -> tuple[list[RawSegment], dict[int, list[Heard]], int]:
    """The layers of a document's cache, what selected while it was asked its questions, and the first candidate."""
    method = parse(preset("tokenselect"))
    reader = Listening(**{part.name: getattr(method.read, part.name) for part in fields(method.read)})
    sample = world.sample("needle", tokens - ROOM, seed=1_000_000 + seed, facts=QUESTIONS, questions=QUESTIONS)
    document = kvote.Document(model, tokenizer, sample.document, replace(method, read=reader))
    reader.heard.clear()
    for question in sample.questions:
        document.ask(question.prompt, max_new_tokens=4)
    return [layer.segment for layer in document.cache.managed], reader.heard, reader.sinks


def stored(source: RawSegment, kind: str) -> RawSegment:
    """The keys and values of ``source`` once more, with a sketch of that kind beside them."""
    key, value = source.decode([0], 0, source.length(0))
    bits = SKETCHES[kind]
    segment = RawSegment(source.heads, key, value.shape[-1], source.rope)
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


def judge(segment: RawSegment, heard: list[Heard], sinks: int) -> list[Any]:
    """Per query, [top_k][way to vote]: the mass of the winners, and the share of the exact winners among them."""
    segments = {kind: stored(segment, kind) for kind in SKETCHES}
    key = segment.decode([0], 0, segment.length(0))[0][0]
    results = []
    for query, edge in heard:
        mass = attention(query, key[:, sinks:edge])
        row = []
        for k in TOP_K:
            found = []
            for kind, again in WAYS.values():
                nominate = HeadVotes(**{**PARAMETERS, "top_k": k, "sketch": kind}).nominated if again else 0
                held, more = segments[kind], [nominate] if nominate else []
                voted = held.indexes.get("sketch", held)
                chosen = voted.winners(query[None, :, None], [0], sinks, [edge], k, *more)
                found.append(chosen[0, 0] - sinks)
            row.append([[float(mass[i].sum()), float(torch.isin(i, found[0]).float().mean())] for i in found])
        results.append(row)
    return results


def summary(layer: int, names: list[str], results: Tensor, documents: int) -> list[dict[str, Any]]:
    """One entry per top_k and way to vote, from ``results`` [queries, top_k, ways, (mass, shared)]."""
    entries = []
    for i, k in enumerate(TOP_K):
        exact = results[:, i, 0, 0]
        for j, name in enumerate(names):
            mass, shared = results[:, i, j, 0], results[:, i, j, 1]
            by_document = (exact - mass).reshape(documents, -1).mean(dim=1)
            entry = {
                "layer": layer,
                "top_k": k,
                "votes": name,
                "mass_percent": mass.mean(),
                "points_lost": (exact - mass).mean(),
                "points_lost_worst_document": by_document.max(),
                "points_lost_worst_query": (exact - mass).max(),
                "shared_percent": shared.mean(),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--documents", type=int, default=3)
    options = parser.parse_args()
    model, tokenizer = load_embedded()
    results: dict[int, list[Any]] = {}
    for seed in range(options.documents):
        segments, heard, sinks = listen(model, tokenizer, options.tokens, seed)
        for layer, segment in enumerate(segments):
            results.setdefault(layer, []).extend(judge(segment, heard[layer], sinks))
    entries = []
    for layer, rows in results.items():
        entries += summary(layer, list(WAYS), torch.tensor(rows), options.documents)
    queries = len(results[0])
    print(f"{queries} queries per layer. Exact votes: mass, %. Sketches: points lost (winners shared).")
    print(render(entries))
    save("recall", {"tokens": options.tokens, "documents": options.documents, "queries": queries, "entries": entries})


if __name__ == "__main__":
    main()
