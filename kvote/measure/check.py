"""Checks before a time is printed: answers must equal the law's, in float32, on the same numbers.

Every kernel answers another query first, so that an answer left over from an earlier call cannot pass for its own.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvote.errors import KvoteError
from kvote.heads import HeadGroups
from kvote.kernels import reference
from kvote.kernels.lanes import PAGE
from kvote.layer import Layer
from kvote.measure.geometry import Geometry
from kvote.method import Method
from kvote.read.head_votes import HeadVotes
from kvote.read.reader import Reading
from kvote.store.segment import Scaling
from kvote.tokens import Queries, Span, TokenSet

# Relative errors that rounding leaves in any head's attention, in exact votes and in votes from a sketch. A page of 64
# tokens gone from 131,072 makes 0.02.
_ATTENTION, _EXACT, _SKETCHED = 0.01, 0.001, 0.01
# Share of the law's winners that must be found too; random scores nearly tie.
_WINNERS = 0.99


class WrongAnswerError(KvoteError):
    """A kernel does not compute what the law says."""

    exit_code = 1


@dataclass
class RecordingReader:
    """A reader, and what it read last."""

    reader: Any
    read_last: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)

    def read(self, reading: Reading) -> Iterator[Span]:
        for span in self.reader.read(reading):
            index = span.reads[-1].index
            self.read_last = index[0, 0] if isinstance(index, Tensor) else torch.arange(index.start, index.stop)
            yield span


def law_of(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The law's answer [b, heads, t, dim] in float32 to ``query`` [b, heads, t, dim], one key head at a time to save
    memory."""
    queries_per_kv = query.shape[1] // key.shape[1]
    parts = [
        reference.attend(
            query[:, h * queries_per_kv : (h + 1) * queries_per_kv].float(),
            key[:, h : h + 1],
            value[:, h : h + 1],
            scale=scale,
        )[0]
        for h in range(key.shape[1])
    ]
    return torch.cat(parts, dim=1)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The law's answer [heads, dim] to one query [1, heads, 1, dim]."""
    return law_of(query, key, value, scale)[0, :, 0]


def votes(query: Tensor, key: Tensor, bits: int, candidates: range) -> Tensor:
    """The law's votes [n] of ``query`` [1, heads, 1, dim] on the ``candidates`` among all tokens of ``key``
    [1, kv_heads, m, dim], or on their sketch."""
    queries_per_kv, total = query.shape[1] // key.shape[1], torch.zeros(len(candidates))
    for h in range(key.shape[1]):
        mine, keys = query[:, h * queries_per_kv : (h + 1) * queries_per_kv], key[:, h : h + 1]
        voted = keys[:, :, candidates.start : candidates.stop]
        if bits:
            mine, voted = reference.sketched_query(mine), reference.sketched(voted - reference.centre(keys, PAGE), bits)
        total += reference.soft_votes(reference.scores(mine, voted))[0, 0]
    return total


def close(name: str, mine: Tensor, law: Tensor, tolerance: float = _ATTENTION) -> None:
    """Raises WrongAnswerError unless the relative error of every row is within ``tolerance``."""
    error = ((mine.float().reshape(law.shape) - law).norm(dim=-1) / law.norm(dim=-1)).max().item()
    if not error <= tolerance:
        raise WrongAnswerError(f"{name} is off by {error:.2g} of the right answer on this machine; no figures.")


def votes_close(name: str, mine: Tensor, law: Tensor, bits: int) -> None:
    """Raises WrongAnswerError unless the votes are those of the law."""
    close(name, mine, law, _SKETCHED if bits else _EXACT)


def found(name: str, winners: Tensor, law: Tensor) -> None:
    """Raises WrongAnswerError unless ``winners`` are, for the most part, the tokens with the most votes in ``law``."""
    best = set(law.topk(len(winners)).indices.tolist())
    share = len(best & set(winners.tolist())) / len(winners)
    if share < _WINNERS:
        raise WrongAnswerError(f"{name} finds only {share:.0%} of the right tokens on this machine; no figures.")


def largest(name: str, index: Tensor, votes: Tensor) -> None:
    """Raises WrongAnswerError unless ``index`` [k] is ascending and has the k largest votes [n]."""
    ascending = bool((index.diff() > 0).all())
    if not ascending or not torch.equal(votes[index].sort(descending=True).values, votes.topk(len(index)).values):
        raise WrongAnswerError(f"{name} does not find the largest votes on this machine; no figures.")


def step(name: str, layer: Layer, geometry: Geometry, bits: int, window: int, ends: tuple[int, int]) -> None:
    """One decode step of a selecting layer: the tokens it read are the right ones, and the answer is theirs.

    ``ends``: tokens read without selection at the beginning, and at the end besides the query's own.
    """
    segment, reader = layer.segment, layer.method.read
    assert segment is not None
    assert layer.rope is not None
    watched = RecordingReader(reader)
    # What is read cannot be watched where the step is one call of a kernel; that has to answer the same.
    layer.method, layer.one_call_step, short = Method(read=watched), False, layer.one_call_step
    asked, n = geometry.step(layer.seen), layer.seen
    layer.attend(geometry.step(n))
    layer.crop(1)
    mine = [layer.attend(asked)]
    layer.method, layer.one_call_step = Method(read=reader), short
    if short:
        layer.crop(1)
        mine.append(layer.attend(asked))
    assert watched.read_last is not None
    key, value = segment.decode([0], 0, n + 1)
    unrotated = layer.rope.undo(asked.query, layer.rope.angles(asked.positions, geometry.dtype)).float()
    index = watched.read_last
    angles = layer.rope.contiguous(max(len(index), window + 1), unrotated.device)
    scoring = rotated(unrotated, angles, slice(window, window + 1))
    first, last = ends
    # A sketch that only nominates leaves the last word to the keys.
    scored = 0 if isinstance(reader, HeadVotes) and reader.nominated else bits
    law = votes(scoring, key, scored, range(first, n - last))
    found(name, index[first : len(index) - last - 1] - first, law)
    placed = rotated(key[:, :, index].float(), angles, slice(0, len(index)))
    query = rotated(unrotated, angles, slice(len(index) - 1, len(index)))
    for out in mine:
        close(name, out, attention(query, placed, value[:, :, index], geometry.scale))
    layer.crop(1)


def answers(name: str, run: Callable[[Tensor], Tensor], geometry: Geometry, law: Callable[[Tensor], Tensor]) -> None:
    """Raises WrongAnswerError unless ``run`` of a query is attention as the ``law`` has it."""
    run(geometry.query())
    query = geometry.query()
    close(name, run(query), law(query))


@dataclass
class LawReader:
    """The reader of a layer, and what the law answers [1, heads, dim] in a decode step to what it read last."""

    reader: Any
    layer: Layer
    scaling: Scaling
    answer: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)

    def read(self, reading: Reading) -> Iterator[Span]:
        for span in self.reader.read(reading):
            queries = reading.queries.rows(span.start, span.stop)
            answers = [_lawful(reading, tokens, self.scaling) for tokens in span.reads]
            if span.unread is not None:
                answers = span.unread.beside(*reference.merge(answers))
            answers += [
                slotless_attention
                for slotless_attention in self._slotless(queries, reading)
                if slotless_attention is not None
            ]
            self.answer = reference.merge(answers)[0][:, :, 0]
            yield span

    def _slotless(self, queries: Queries, reading: Reading) -> list[tuple[Tensor, Tensor] | None]:
        held = reading.segment.slotless_attention(queries, reading.rows, self.scaling)
        return [
            held,
            self.layer.method.keep.slotless_attention(queries, reading.rows, self.scaling, self.layer.record.memory),
        ]


def decoding(name: str, layer: Layer | HeadGroups, geometry: Geometry) -> None:
    """Raises WrongAnswerError unless a decode step answers what the law does with the tokens that it reads, as they are
    stored. The token of the step stays. Where the step is one call of a kernel, a copy takes that, and must answer the
    same."""
    step = geometry.step(layer.seen)
    short = [part.one_call_step for part in layer.parts]
    answers = [copy.deepcopy(layer).attend(step)[0, 0]] if any(short) else []
    watched = []
    for part in layer.parts:
        part.one_call_step = False
        reader = LawReader(part.method.read, part, Scaling(geometry.scale))
        watched.append((part, part.method, reader))
        part.method = replace(part.method, read=reader)
    answers.append(layer.attend(step)[0, 0])
    for (part, method, _), steps in zip(watched, short, strict=True):
        part.method, part.one_call_step = method, steps
    each = geometry.heads // geometry.kv_heads
    heads = (
        [g.query_heads(each) for g in layer.head_groups]
        if isinstance(layer, HeadGroups)
        else [list(range(len(answers[0])))]
    )
    for (_, _, reader), mine in zip(watched, heads, strict=True):
        assert reader.answer is not None
        for out in answers:
            close(name, out[mine], reader.answer[0])


def _lawful(reading: Reading, tokens: TokenSet, scaling: Scaling) -> tuple[Tensor, Tensor]:
    """The law's answer of one query to a token set: out [1, heads, 1, dim] and its log-sum-exp."""
    segment, index = reading.segment, tokens.index
    n, heads = reading.first + reading.count, reading.queries.rotated.shape[1]
    each = heads // segment.heads
    key, value = segment.decode(reading.rows, 0, n)
    # The query is the last of its list: a window is the end of it.
    begin = 0 if tokens.window is None else max(0, len(tokens) - tokens.window)
    outs, totals = [], []
    for head in range(heads):
        lane = slice(head // each, head // each + 1)
        slots = torch.arange(index.start, index.stop) if isinstance(index, range) else index.flatten(0, -2)
        slots = slots if slots.dim() == 1 else slots[head if len(slots) == heads else 0]
        slots = slots[begin:]
        k, v, q = key[:, lane, slots].float(), value[:, lane, slots], reading.queries.rotated[:, head : head + 1]
        if reading.rope is not None:
            k, q = _placed(reading, tokens, k, slots, head, begin)
        out, lse = reference.attend(q.float(), k, v, scale=scaling.scale, softcap=scaling.softcap)
        outs.append(out)
        totals.append(lse)
    return torch.cat(outs, dim=1), torch.cat(totals, dim=1)


def _placed(
    reading: Reading, tokens: TokenSet, key: Tensor, slots: Tensor, head: int, begin: int
) -> tuple[Tensor, Tensor]:
    """Keys from position 0, and the query of a head, where they stand for each other; the first is ``begin``th of the
    list."""
    rope, unrotated = reading.rope, reading.queries.unrotated
    assert rope is not None
    assert unrotated is not None
    if tokens.positions == "original":
        each = unrotated.shape[1] // reading.segment.heads
        places = reading.segment.positions(reading.rows[0])[head // each][slots]
        cos, sin = rope.angles(places[None], torch.float32)
        return rope.apply(key, (cos[:, None], sin[:, None])), reading.queries.rotated[:, head : head + 1]
    last = len(tokens) - 1 if tokens.query_at is None else tokens.query_at
    angles = rope.contiguous(max(len(tokens), last + 1), key.device)
    placed = rotated(key, angles, slice(0, 1) if tokens.positions == "together" else slice(begin, len(tokens)))
    return placed, rotated(unrotated[:, head : head + 1].float(), angles, slice(last, last + 1))


def rotated(x: Tensor, angles: tuple[Tensor, Tensor], at: slice) -> Tensor:
    """The law's rotation of ``x`` [..., n, dim] by some rows of ``angles``."""
    return reference.rotate(x, angles[0][at], angles[1][at])
