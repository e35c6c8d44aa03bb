"""Whole sentences, those whose mean key is most like the mean query of the sentence that is being generated."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvote.errors import MethodError
from kvote.extra_inputs import IDS
from kvote.needs import ReaderOffers
from kvote.numbers import check_whole
from kvote.read.per_head import LISTS, ReadsLists, span_of
from kvote.read.reader import Reading, everything
from kvote.read.running import Grouped, Running, Sentences
from kvote.tokens import Span


@dataclass(frozen=True)
class BestSentences(ReadsLists):
    """Parameters as in ``methods/sentencekv.py``, which documents them."""

    ends: tuple[int, ...]
    tokens: int
    first: int
    last: int
    longest: int

    needs = replace(LISTS, extra_inputs=frozenset({IDS}), prompts=True)
    # Rows of a batch end their sentences at other times.
    offers = ReaderOffers(alone=True)

    def __post_init__(self) -> None:
        check_whole(self, tokens=1, first=0, last=1, longest=1)
        if self.tokens <= self.first + self.last:
            raise MethodError(
                f"tokens must exceed the {self.first} first and {self.last} last ones, which are always read; "
                f"got {self.tokens}."
            )
        if not isinstance(self.ends, tuple | list) or not all(type(each) is int and each >= 0 for each in self.ends):
            raise MethodError(f"ends must be token ids, such as (13, 30, 0); got {self.ends!r}.")

    def check(self, layers: int) -> None:
        if not self.ends:
            raise MethodError(
                "sentencekv must be told which tokens end a sentence: write sentencekv(ends=(13, 30)), with the ids "
                "that kvote.sentences.sentence_ends(tokenizer) gives."
            )

    def new_memory(self) -> Sentences:
        return Sentences()

    def read(self, reading: Reading) -> Iterator[Span]:
        assert isinstance(reading.memory, Sentences)
        now = [self._noted(reading, reading.memory, i) for i in range(len(reading.rows))]
        # The first token of a sentence, and the one that ends it, read everything.
        if not reading.decode or reading.first + 1 <= self.tokens or len(now[0].at) <= 1:
            yield everything(reading)
            return
        reading.activity.selections += 1
        yield span_of(reading, self._chosen(reading, reading.memory, now[0])[None, :, None])

    def _noted(self, reading: Reading, memory: Sentences, i: int) -> Running:
        """A sequence's sentences once the tokens of this pass are among them."""
        row, query = reading.rows[i], reading.queries.rotated[i]
        places = reading.segment.positions(row)[0][-reading.count :].long()
        assert reading.extra_inputs is not None
        assert reading.extra_inputs.ids is not None
        ids = reading.extra_inputs.ids[i].to(places.device)
        ends = torch.isin(ids, torch.tensor(self.ends, device=ids.device))
        none = places[:0]
        old = memory.rows.get(row, Running(none, query.new_empty(0, query.shape[0], query.shape[2]), none))
        old = old.before(int(places[0]))
        now = old.generated(places, bool(ends[0]), query[:, 0]) if reading.decode else old.read(places, ends)
        if len(now.ends) != len(old.ends):
            memory.grouped.pop(row, None)
        memory.rows[row] = now
        return now

    def _chosen(self, reading: Reading, memory: Sentences, now: Running) -> Tensor:
        """The tokens [heads, m] of the only sequence that its heads read, ascending."""
        row, n = reading.rows[0], reading.first + 1
        if row not in memory.grouped:
            memory.grouped[row] = self._grouped(reading, row, now)
        known, query = memory.grouped[row], now.queries.float().mean(0)
        groups = len(query) // len(known.keys)
        scores = torch.einsum("hgd,hsd->hgs", query.view(-1, groups, query.shape[1]), known.keys).flatten(0, 1)
        ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        # What lies between the first and the last tokens: the best sentences first, each from its beginning on.
        stop = max(self.first, min(known.of.shape[1], n - self.last))
        between = known.of[:, self.first : stop].repeat_interleave(groups, dim=0)
        slots = torch.arange(self.first, stop, device=between.device)
        order = ranks.gather(1, between) * n + slots
        count = min(self.tokens - self.first - self.last, order.shape[1])
        best = order.topk(count, dim=1, largest=False).values % n
        ends = [torch.arange(self.first, device=slots.device), torch.arange(n - self.last, n, device=slots.device)]
        first, last = (each.expand(len(best), -1) for each in ends)
        return torch.cat([first, best.sort(dim=1).values, last], dim=1)

    def _grouped(self, reading: Reading, row: int, now: Running) -> Grouped:
        """The sentences of the tokens held, up to the last that has ended."""
        places = torch.stack([each.long() for each in reading.segment.positions(row)])
        closed = int((places[0] <= now.ends[-1]).sum())
        key = reading.segment.decode([row], 0, closed)[0][0].float()
        places = places[:, :closed].contiguous()
        number = torch.searchsorted(now.ends, places)
        begin = torch.cat([now.ends.new_full((1,), -1), now.ends])[number] + 1
        # What goes on for long without an end is cut.
        piece = number * (int(places.max()) + 2) + (places - begin) // self.longest
        names, of = torch.unique(piece, return_inverse=True)
        sums = key.new_zeros(len(key), len(names), key.shape[2])
        sums.scatter_add_(1, of[..., None].expand_as(key), key)
        counts = key.new_zeros(len(key), len(names)).scatter_add_(1, of, torch.ones_like(of, dtype=key.dtype))
        return Grouped(of, sums / counts.clamp(min=1)[..., None])
