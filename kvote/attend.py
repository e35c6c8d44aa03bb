"""Attention of one layer: over the tokens that its reader names, and over tokens that have no slot."""

from dataclasses import replace

import torch
from torch import Tensor

from kvote import kernels
from kvote.layer_state import LayerState
from kvote.read.reader import Reading
from kvote.step import Step
from kvote.store.segment import Scaling
from kvote.tokens import Queries, Span


def attend_spans(layer: LayerState, reading: Reading, step: Step) -> tuple[Tensor, Tensor, list[Span]]:
    """Attention of the queries [b, heads, t, dv], its log-sum-exp [b, heads, t], and the spans that were read."""
    pieces, totals, spans = [], [], []
    for span in layer.method.read.read(reading):
        if layer.right_padded:
            span = span.in_place(reading.first + span.stop)
        queries = reading.queries.rows(span.start, span.stop)
        answers = [reading.segment.attend(queries, reading.rows, read, step.scaling) for read in span.reads]
        if span.unread is not None:
            answers = span.unread.beside(*kernels.merge(answers))
        answers += slotless_answers(layer, queries, reading.rows, step.scaling)
        out, lse = kernels.merge(answers)
        if step.sink_logits is not None:
            out = kernels.with_sink_logits(out, lse, step.sink_logits)
            lse = torch.logaddexp(lse, step.sink_logits.float().reshape(1, -1, 1))
        if layer.reads is not None and reading.decode:
            layer.reads.add(reading, span)
        reading.answered = lse
        pieces.append(out)
        totals.append(lse)
        # Whoever asks for the spans asks which tokens were read.
        spans.append(replace(span, unread=None) if span.unread is not None else span)
    if len(pieces) == 1:
        return pieces[0], totals[0], spans
    return torch.cat(pieces, dim=2), torch.cat(totals, dim=2), spans


def slotless_answers(
    layer: LayerState, queries: Queries, rows: list[int], scaling: Scaling
) -> list[tuple[Tensor, Tensor]]:
    """Attention over the tokens without a slot, which every query reads: no answer, one or two."""
    assert layer.segment is not None
    held = layer.segment.slotless_attention(queries, rows, scaling)
    gone = layer.method.keep.slotless_attention(queries, rows, scaling, layer.record.memory)
    return [answer for answer in (held, gone) if answer is not None]
