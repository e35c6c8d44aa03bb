"""Prompts that read the lines on which sampled queries look, and answers that choose anew what they read of them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvote import kernels
from kvote.errors import MethodError
from kvote.needs import ReaderOffers
from kvote.numbers import check_whole, is_number
from kvote.read.exchanges import Exchanges
from kvote.read.lines import Lines, lines
from kvote.read.per_head import ReadsLists
from kvote.read.reader import Reading, everything
from kvote.tokens import Span, TokenSet


@dataclass(frozen=True)
class SparseTurns(ReadsLists):
    """Parameters as in ``methods/loopserve.py``, which documents them."""

    alpha: float
    last: int
    sample: int
    block: int
    top_k: int
    every: int
    window: int
    kernel: int
    seed: int

    # Answers choose by queries that a rollback cannot bring back. Rows of a batch choose at other times.
    offers = ReaderOffers(adds_up=True, alone=True)

    def __post_init__(self) -> None:
        check_whole(self, last=1, sample=0, block=1, top_k=1, every=1, window=1, kernel=1, seed=0)
        if self.kernel % 2 == 0:
            raise MethodError(f"kernel must be odd, so that a pooled vote stays at its token; got {self.kernel}.")
        if not is_number(self.alpha) or not 0 < self.alpha <= 1:
            raise MethodError(f"alpha must be a share of attention, above 0 and at most 1; got {self.alpha!r}.")

    def new_memory(self) -> Exchanges:
        return Exchanges(self.window)

    def read(self, reading: Reading) -> Iterator[Span]:
        memory, queries = reading.memory, reading.queries.rotated
        assert isinstance(memory, Exchanges)
        if not reading.recording:
            memory.settle(reading.rows)
        else:
            for i, row in enumerate(reading.rows):
                memory.note(row, reading.first, queries[i])
        if reading.decode:
            yield self._answer(reading, memory)
            return
        for i, row in enumerate(reading.rows):
            memory.rows[row] = memory.of(row, queries[i]).prompted(reading.first, queries[i], self.window)
            memory.chosen.pop(row, None)
        if self.alpha == 1 or reading.count <= self.last + self.sample:
            yield everything(reading)
        else:
            yield from self._prompt(reading)

    def _answer(self, reading: Reading, memory: Exchanges) -> Span:
        """What the generated token of one sequence reads: what was chosen of the prompt, and all of the answer."""
        (row,), n = reading.rows, reading.first + 1
        exchange = memory.of(row, reading.queries.rotated[0])
        if exchange.recent.shape[1] == self.every:
            exchange = exchange.renewed()
            memory.chosen.pop(row, None)
        memory.rows[row] = exchange.answered(reading.queries.rotated[0])
        if exchange.edge <= self.top_k:
            return everything(reading)
        if row in memory.chosen:
            reading.activity.reused += 1
        else:
            memory.chosen[row] = self.chosen(reading, exchange.asked, exchange.edge, exchange.of_prompt)
            reading.activity.selections += 1
        index = memory.chosen[row][None, :, None]
        reading.activity.tokens_read = index.shape[-1] + n - exchange.edge
        return Span(0, 1, [TokenSet(index, causal=False), TokenSet(range(exchange.edge, n), causal=False)])

    def chosen(self, reading: Reading, asked: Tensor, edge: int, of_prompt: bool) -> Tensor:
        """The ``top_k`` tokens [heads, k] before slot ``edge`` to which the queries ``asked`` [heads, m, d] of the only
        sequence give the most attention, ascending; ``of_prompt``: they are those of the last tokens there."""
        m = asked.shape[1]
        logits = reading.scaled(reading.segment.scores(asked[None], reading.rows, 0, edge))[0].transpose(0, 1).float()
        if of_prompt:
            late = (
                torch.arange(edge, device=logits.device) > torch.arange(edge - m, edge, device=logits.device)[:, None]
            )
            logits = logits.masked_fill(late, float("-inf"))
        votes = logits.softmax(-1).sum(1)
        return kernels.top_k(avg_pool1d(votes, self.kernel, 1, self.kernel // 2), self.top_k)

    def _prompt(self, reading: Reading) -> Iterator[Span]:
        """Blocks of a prompt's queries read the lines of their heads, and one another."""
        b, heads = reading.queries.rotated.shape[:2]
        reading.activity.selections += b
        found, row, read = self._lines(reading), 0, 0
        while row < reading.count:
            start = reading.first + row
            stop = min(reading.first + reading.count, start - start % self.block + self.block)
            index = found.read(start, stop).view(b, heads, 1, -1)
            sets = [TokenSet(index, causal=False)] if index.shape[-1] else []
            yield Span(row, stop - reading.first, [*sets, TokenSet(range(start, stop), causal=stop - start > 1)])
            read, row = index.shape[-1] + stop - start, stop - reading.first
        reading.activity.tokens_read = read

    def _lines(self, reading: Reading) -> Lines:
        """The lines of all sequences and heads, [b * heads, n] each, by their last queries and some of the others."""
        at, n = self.sampled(reading.first, reading.count), reading.first + reading.count
        at = at.to(reading.segment.device)
        query = reading.queries.rotated[:, :, at]
        slots, found = at + reading.first, []
        late = torch.arange(n, device=at.device) > slots[:, None]
        for i in range(len(reading.rows)):
            products = reading.segment.scores(query[i : i + 1], reading.rows[i : i + 1], 0, n)[0].transpose(0, 1)
            logits = reading.scaled(products).float().masked_fill(late, float("-inf"))
            found.append(lines(logits.softmax(-1), slots, self.alpha))
        return Lines(*(torch.cat([getattr(each, name) for each in found]) for name in ("columns", "slashes", "worth")))

    def sampled(self, first: int, count: int) -> Tensor:
        """Which of a prompt's ``count`` queries are asked where they look, ascending."""
        drawn = torch.randperm(count - self.last, generator=torch.Generator().manual_seed(self.seed + first))
        return torch.cat([drawn[: self.sample].sort().values, torch.arange(count - self.last, count)])
