"""Rows of a batch that hold and add equally many tokens, computed as one block; and the queries of padding columns."""

from collections.abc import Callable

import torch
from torch import Tensor

from kvote import kernels
from kvote.extra_inputs import ExtraInputs
from kvote.step import Step
from kvote.store.segment import Segment
from kvote.tokens import Queries, TokenSet

Answer = tuple[Tensor, Tensor]


class RowGroup:
    """Cuts the rows and columns of one group out of the batch, and puts its answers back."""

    def __init__(self, rows: list[int], columns: Tensor | None, b: int) -> None:
        self.rows = None if len(rows) == b and rows == list(range(b)) else rows
        self.columns = columns

    @property
    def is_everything(self) -> bool:
        return self.rows is None and self.columns is None

    def cut(self, x: Tensor) -> Tensor:
        """[b, h, t, ...] to [rows of the group, h, tokens of the group, ...]."""
        x = x if self.rows is None else x[self.rows]
        if self.columns is None:
            return x
        return torch.stack([x[i, :, columns] for i, columns in enumerate(self.columns)])

    def extra_inputs(self, extra_inputs: ExtraInputs | None) -> ExtraInputs | None:
        """The extra inputs of the rows of the group, without padding."""
        if extra_inputs is None or self.is_everything:
            return extra_inputs
        return extra_inputs.each(lambda x: self.cut(x[:, None])[:, 0])

    def put(self, out: Tensor, answer: Tensor) -> None:
        rows = range(out.shape[0]) if self.rows is None else self.rows
        for i, row in enumerate(rows):
            columns = slice(None) if self.columns is None else self.columns[i]
            out[row, :, columns] = answer[i]


def rows_alike(held: list[int], valid: Tensor | None, t: int) -> list[tuple[list[int], Tensor | None]]:
    """Rows that can be computed together, and the columns [rows, n] of their tokens where padding is among them.

    ``held``: tokens of each row before the pass, which may be left out for a single row without padding; ``valid``
    bool [b, t]: new columns that are tokens, None for all.
    """
    if valid is None and len(held) <= 1:
        return [([0], None)]
    new = [t] * len(held) if valid is None else valid.sum(dim=1).tolist()
    same: dict[tuple[int, int], list[int]] = {}
    for row, counts in enumerate(zip(held, new, strict=True)):
        same.setdefault(counts, []).append(row)
    row_groups: list[tuple[list[int], Tensor | None]] = []
    for (_, count), rows in same.items():
        if valid is None or count == t:
            row_groups.append((rows, None))
        elif count:
            row_groups.append((rows, torch.stack([valid[row].nonzero()[:, 0] for row in rows])))
    return row_groups


def one_by_one(row_groups: list[tuple[list[int], Tensor | None]]) -> list[tuple[list[int], Tensor | None]]:
    """The same rows, each a group of its own."""
    return [
        ([row], None if columns is None else columns[i : i + 1])
        for rows, columns in row_groups
        for i, row in enumerate(rows)
    ]


def answer_pads(
    out: Tensor, step: Step, segment: Segment, held: list[int], slotless: Callable[[Queries, list[int]], list[Answer]]
) -> bool:
    """Writes into ``out`` [b, heads, t, dv] what queries of padding read that stand behind tokens of their row: all
    tokens up to there, whatever the method, as with any other cache.

    The first token of an answer comes from such a query where prompts are padded on the right. ``held``: tokens of
    each row before the pass; those of the pass are in the ``segment``. ``slotless``: what tokens without a slot answer.
    Says whether there was any such query.
    """
    assert step.valid is not None
    real, found = step.valid.long(), False
    seen = real.cumsum(dim=1) + torch.tensor(held, device=real.device)[:, None]
    for row, counts in enumerate((seen * (1 - real)).tolist()):
        for count in sorted(set(counts) - {0}):
            found = True
            at = [column for column, own in enumerate(counts) if own == count]
            queries = Queries(step.query[row : row + 1, :, at])
            answers = [segment.attend(queries, [row], TokenSet(range(count), causal=False), step.scaling)]
            answer, lse = kernels.merge(answers + slotless(queries, [row]))
            if step.sink_logits is not None:
                answer = kernels.with_sink_logits(answer, lse, step.sink_logits)
            out[row, :, at] = answer[0].to(out.dtype)
    return found
