"""Marked spans: stretches of a text that are named by whoever knows what they are, such as an image or a question."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote.errors import InputError
from kvote.numbers import is_whole

# Of each prompt of a batch the columns of one name; one list alone is for all prompts.
Spans = list[list[range]]


@dataclass
class Marked:
    """``spans`` by name. Rows that a batch has of each prompt (beams, several answers) stand side by side."""

    spans: dict[str, Spans] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.spans)

    def add(self, name: str, start: int | Sequence[int], stop: int | Sequence[int], seen: int) -> None:
        """Names columns ``start`` to ``stop``, or those of each prompt. Raises InputError for columns among the first
        ``seen``, and for what is no span."""
        if not isinstance(name, str) or not name:
            raise InputError(f"A mark has a name, such as 'image'; got {name!r}.")
        new: Spans = [[range(*span)] for span in _pairs(start, stop)]
        if any(span.start < seen for each in new for span in each):
            raise InputError(
                f"The first {seen:,} columns have been read already, and marks are shown with the tokens that they are "
                "about; mark a span before it is read."
            )
        held = self.spans.get(name, [[]])
        rows = max(len(held), len(new))
        if min(len(held), len(new)) not in (1, rows):
            raise InputError(f"{name!r} is marked in {len(held)} prompts; got spans for {len(new)}.")
        self.spans[name] = [a + b for a, b in zip(_of_rows(held, rows), _of_rows(new, rows), strict=True)]

    def shown(self, rows: int, columns: range, device: torch.device) -> dict[str, Tensor]:
        """By name, which ``columns`` are marked: bool [rows, columns]. Raises InputError for rows that are no whole
        multiple of the prompts that were marked."""
        found = {}
        for name, spans in self.spans.items():
            if rows % len(spans):
                raise InputError(f"{name!r} is marked in {len(spans)} prompts, and the batch has {rows} rows.")
            marked = torch.zeros(len(spans), len(columns), dtype=torch.bool)
            for row, each in enumerate(spans):
                for span in each:
                    first, last = (max(0, column - columns.start) for column in (span.start, span.stop))
                    marked[row, first:last] = True
            found[name] = marked.to(device).repeat_interleave(rows // len(spans), dim=0)
        return found

    def select(self, index: Tensor, rows: int) -> None:
        """Row i of ``rows`` is now a copy of the former row ``index[i]``."""
        # Most texts have no marks, and looking at numbers on a device would wait for it.
        if not self.spans:
            return
        chosen = torch.arange(rows)[torch.as_tensor(index).cpu()].tolist()
        for name, spans in self.spans.items():
            if len(spans) > 1 and rows:
                every = _of_rows(spans, rows)
                self.spans[name] = [list(every[i]) for i in chosen]

    def until(self, columns: int) -> "Marked":
        """The same without what is marked from ``columns`` on."""
        return Marked({name: _cut(spans, columns) for name, spans in self.spans.items()})

    def crop(self, columns: int, seen: int) -> None:
        """Forgets what is marked of the columns from ``columns`` to ``seen``, which are gone."""
        for name, spans in list(self.spans.items()):
            before, after = _cut(spans, columns), [[span for span in each if span.start >= seen] for each in spans]
            left = [a + b for a, b in zip(before, after, strict=True)]
            if any(left):
                self.spans[name] = left
            else:
                del self.spans[name]


def _pairs(start: int | Sequence[int], stop: int | Sequence[int]) -> list[tuple[int, int]]:
    """Raises InputError for what are no spans."""
    starts, stops = (list(each) if isinstance(each, Sequence) else [each] for each in (start, stop))
    whole = all(map(is_whole, starts + stops)) and len(starts) == len(stops) > 0
    if not whole or not all(0 <= a < b for a, b in zip(starts, stops, strict=True)):
        raise InputError(
            "A span is from a column up to a later one, as whole numbers, or as one list of each with a number for "
            f"every prompt; got {start!r} and {stop!r}."
        )
    return [(int(a), int(b)) for a, b in zip(starts, stops, strict=True)]


def _of_rows(spans: Spans, rows: int) -> Spans:
    """Those of each of ``rows``, which stand side by side for each prompt."""
    return [spans[row * len(spans) // rows] for row in range(rows)]


def _cut(spans: Spans, columns: int) -> Spans:
    return [[range(span.start, min(span.stop, columns)) for span in each if span.start < columns] for each in spans]
