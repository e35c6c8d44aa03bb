"""Observation: what a keeper sees of one pass. Attention received is computed from it, never stored as a matrix."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvote.extra_inputs import ExtraInputs
from kvote.kernels.masks import end_aligned
from kvote.rope import Rope
from kvote.store.segment import Scaling, Segment
from kvote.tokens import Queries, Span, TokenSet


@dataclass(frozen=True)
class Observation:
    """One pass of equally long sequences. Query row i is slot ``first + i`` of each of the sequences ``rows``.

    ``lse`` [b, heads, t]: log-sum-exp of all that each query row read, which was ``spans``. ``prompt_left``: tokens of
    the prompt still to come after this pass; negative where the pass goes on behind the prompt's end; None where the
    tokens are generated ones. ``rope``: the layer's rotation, where the method has to know it. ``repeats``: of a pass
    that reads tokens again (``kvote.repeat``), their slots in each sequence of the batch. ``layer``: the model's.
    ``extra_inputs``: token ids and hidden states of its rows, where the keeper says that it needs them.
    """

    queries: Queries
    lse: Tensor
    segment: Segment
    rows: list[int]
    first: int
    spans: list[Span]
    scaling: Scaling
    prompt_left: int | None
    rope: Rope | None = None
    repeats: Sequence[range] | None = None
    layer: int = 0
    extra_inputs: ExtraInputs | None = None

    @property
    def count(self) -> int:
        return self.lse.shape[2]

    def mass(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Attention [b, h, n] that the tokens held received from query rows ``start`` to ``stop``, in float32.

        The weights of one query row and head add up to 1, over whatever the method let it read.
        """
        stop = self.count if stop is None else stop
        b, h = len(self.rows), self.segment.heads
        mass = torch.zeros(b, h, self.first + self.count, device=self.lse.device)
        for span in self.spans:
            a, z = max(start, span.start), min(stop, span.stop)
            if a >= z:
                continue
            queries, lse = self.queries.rows(a, z), self.lse[:, :, a:z].contiguous()
            for read in span.reads:
                tokens = read.of_rows(span.stop - span.start, a - span.start, z - span.start)
                part = self.segment.attention_mass(queries, lse, self.rows, tokens, self.scaling)
                if isinstance(tokens.index, range):
                    mass[:, :, tokens.index.start : tokens.index.stop] += part[:, :, 0]
                elif tokens.by_head:
                    own = torch.zeros(b, lse.shape[1], mass.shape[2], device=mass.device)
                    own.scatter_add_(2, tokens.index.flatten(2), part.flatten(2))
                    mass += own.reshape(b, h, -1, mass.shape[2]).sum(dim=2)
                else:
                    places = tokens.index.flatten(1)[:, None].expand(-1, h, -1)
                    mass.scatter_add_(2, places, part.flatten(2))
        return mass

    def mass_by_query_head(self, start: int, stop: int) -> Tensor:
        """What ``mass`` is, of each query head by itself: [b, heads, n]."""
        members = range(self.lse.shape[1] // self.segment.heads)
        return torch.stack([self.member(i).mass(start, stop) for i in members], dim=2).flatten(1, 2)

    def weights(self, start: int, stop: int) -> Tensor:
        """Attention [b, heads, rows, n] that query rows ``start`` to ``stop`` gave to the tokens held, in float32.

        A matrix, so for few rows; as ``mass`` for the rest. Where rows read ranges of keys as the model rotated them,
        it is one product; otherwise each row and head is taken by itself, which is slow.
        """
        spans = [span for span in self.spans if span.start < stop and start < span.stop]
        ranges = all(isinstance(read.index, range) for span in spans for read in span.reads)
        if not ranges or self.queries.unrotated is not None:
            return torch.stack([self.mass_by_query_head(j, j + 1) for j in range(start, stop)], dim=2)
        b, heads, _ = self.lse.shape
        weights = torch.zeros(b, heads, stop - start, self.first + self.count, device=self.lse.device)
        for span in spans:
            a, z = max(start, span.start), min(stop, span.stop)
            for read in span.reads:
                tokens = read.of_rows(span.stop - span.start, a - span.start, z - span.start)
                assert isinstance(tokens.index, range)
                weights[:, :, a - start : z - start, tokens.index.start : tokens.index.stop] += self._of_range(
                    a, z, tokens
                )
        return weights

    def _of_range(self, a: int, z: int, tokens: TokenSet) -> Tensor:
        """Weights [b, heads, z - a, m] of query rows on the m tokens of a range that they read."""
        assert isinstance(tokens.index, range)
        query, m = self.queries.rotated[:, :, a:z], len(tokens)
        scores = self.segment.scores(query, self.rows, tokens.index.start, tokens.index.stop)
        logits = scores.transpose(1, 2).float() * self.scaling.scale
        if self.scaling.softcap is not None:
            capped = self.scaling.softcap * torch.tanh(logits / self.scaling.softcap)
            # A lane may have no token there.
            logits = capped.masked_fill(logits == float("-inf"), float("-inf"))
        if tokens.causal:
            unseen = ~end_aligned(z - a, m, tokens.window, logits.device)
            logits = logits.masked_fill(unseen, float("-inf"))
        total = self.lse[:, :, a:z, None].float()
        return torch.exp(logits - total.masked_fill(total == float("-inf"), float("inf")))

    def member(self, i: int) -> "Observation":
        """The same of the i-th query head of each key head alone."""
        heads = slice(i, None, self.lse.shape[1] // self.segment.heads)
        spans = [replace(span, reads=[_of_heads(read, heads) for read in span.reads]) for span in self.spans]
        return replace(self, queries=self.queries.of_heads(heads), lse=self.lse[:, heads].contiguous(), spans=spans)

    def of(self, row: int, length: int) -> "Observation | None":
        """The part about one sequence when it is cut to ``length`` tokens; None if that is nothing."""
        i, count = self.rows.index(row), min(self.count, length - self.first)
        if count <= 0:
            return None
        prompt_left = (
            self.prompt_left
            if self.prompt_left is None or count == self.count
            else min(0, self.prompt_left + self.count - count)
        )
        spans = [_cut(span, i, count) for span in self.spans if span.start < count]
        lse = self.lse[i : i + 1, :, :count]
        extra_inputs = None if self.extra_inputs is None else self.extra_inputs.at(i, 0, count)
        queries = self.queries.of_sequences(slice(i, i + 1)).rows(0, count)
        return replace(
            self, queries=queries, lse=lse, rows=[row], spans=spans, prompt_left=prompt_left, extra_inputs=extra_inputs
        )

    def selected(self, index: list[int]) -> "list[Observation]":
        """The same once sequence i is a copy of the former sequence ``index[i]``."""
        length = self.first + self.count
        parts = [(i, self.of(old, length)) for i, old in enumerate(index) if old in self.rows]
        return [replace(part, rows=[i]) for i, part in parts if part is not None]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that it holds."""
        lists = [read.index for span in self.spans for read in span.reads]
        extra_inputs = [] if self.extra_inputs is None else self.extra_inputs.tensors
        own = [self.lse, self.queries.rotated, self.queries.unrotated, *lists, *extra_inputs]
        return [tensor for tensor in own if isinstance(tensor, Tensor)]


def _of_heads(tokens: TokenSet, heads: slice) -> TokenSet:
    """The tokens that these query heads read."""
    if not isinstance(tokens.index, Tensor) or not tokens.by_head:
        return tokens
    return replace(tokens, index=tokens.index[:, heads].contiguous())


def _cut(span: Span, i: int, count: int) -> Span:
    """The span as sequence i of its group alone reads it in its rows before ``count``."""
    rows, stop = span.stop - span.start, min(span.stop, count)
    reads = [read.of_rows(rows, 0, stop - span.start) for read in span.reads]
    own = [replace(r, index=r.index[i : i + 1]) if isinstance(r.index, Tensor) else r for r in reads]
    return Span(span.start, stop, own)
