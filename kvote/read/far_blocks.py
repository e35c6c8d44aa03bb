"""A window of neighbours, and of what lies behind it the first tokens and the blocks that match."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvote import kernels
from kvote.needs import Keys, Needs, ReaderOffers
from kvote.numbers import check_whole
from kvote.read.local_mass import Blocks, LocalMass, Passed
from kvote.read.reader import ReaderDefaults, Reading
from kvote.tokens import Span, TokenSet


@dataclass(frozen=True)
class FarBlocks(ReaderDefaults):
    """Parameters as in ``methods/infllm.py``, which documents them."""

    block: int
    sinks: int
    window: int
    top_k: int
    representatives: int
    chunk: int

    # What blocks are represented by depends on all queries that saw them near.
    offers = ReaderOffers(adds_up=True)
    needs = Needs(keys=Keys.UNROTATED, lists=True, equal_heads=True, prompts=True)

    def __post_init__(self) -> None:
        check_whole(self, block=1, sinks=0, window=1, top_k=1, representatives=1, chunk=1)

    def new_memory(self) -> LocalMass:
        return LocalMass(self.sinks, self.block)

    def read(self, reading: Reading) -> Iterator[Span]:
        assert isinstance(reading.memory, LocalMass)
        row, memory = 0, reading.memory
        if not reading.recording:
            memory.settle(reading.rows)
        while row < reading.count:
            slot = reading.first + row
            stop = min(reading.count, row + self.chunk - slot % self.chunk)
            if slot < self.sinks + self.window:
                # Nothing is far from these.
                stop = min(reading.count, row + self.sinks + self.window - slot)
                near = TokenSet(range(reading.first + stop), positions="contiguous")
                reading.activity.tokens_read = len(near)
                yield Span(row, stop, [near])
            else:
                for each in reading.rows:
                    self._form(reading, memory, each, slot)
                near = TokenSet(
                    range(slot - self.window + 1, reading.first + stop), window=self.window, positions="contiguous"
                )
                far = self._far(reading, memory, row, stop)
                reading.activity.tokens_read = self.window + sum(map(len, far))
                yield Span(row, stop, [near, *far])
            self._count(reading, memory, row, stop, near)
            row = stop

    def _form(self, reading: Reading, memory: LocalMass, row: int, slot: int) -> None:
        """Makes blocks of the tokens that the window of query ``slot`` has left behind."""
        edge, held = memory.edge(row), memory.held[row]
        new = max(0, (slot - self.window - edge) // self.block)
        if new == 0:
            return
        size = new * self.block
        mass = held.mass[:, :size].view(-1, new, self.block)
        best = mass.topk(min(self.representatives, self.block)).indices
        key = reading.segment.decode([row], edge, edge + size)[0][0]
        # Query heads choose for themselves; the keys are at position 0.
        key = key.view(len(key), new, self.block, -1).repeat_interleave(len(mass) // len(key), dim=0)
        chosen = key.gather(2, best[..., None].expand(-1, -1, -1, key.shape[-1]))
        mean = chosen.mean(2, dtype=torch.float32).to(key.dtype).transpose(0, 1)
        memory.held[row] = Blocks(torch.cat([held.keys, mean]), held.mass[:, size:].clone())

    def _far(self, reading: Reading, memory: LocalMass, row: int, stop: int) -> list[TokenSet]:
        """What queries read behind their windows, all at one distance: first tokens, chosen blocks, and what is in no
        block yet."""
        first, edge = TokenSet(range(self.sinks), False, None, "together", self.window), memory.edge(reading.rows[0])
        rest = TokenSet(range(edge, reading.first + stop - self.window), stop - row > 1, None, "together", self.window)
        blocks = (edge - self.sinks) // self.block
        sets = [each for each in (first, rest) if len(each)]
        if blocks:
            reading.activity.selections += len(reading.rows)
            best = self._best(reading, memory, row, stop)[..., None] * self.block + self.sinks
            index = (best + torch.arange(self.block, device=best.device)).flatten(1)[:, None]
            sets.append(TokenSet(index, False, None, "together", self.window))
        return sets

    def _best(self, reading: Reading, memory: LocalMass, row: int, stop: int) -> Tensor:
        """The blocks [b, k] that queries ``row`` to ``stop`` read, ascending: those with the largest product of what
        represents them with the mean of the queries."""
        query, keys = self._far_queries(reading, row, stop).mean(2), self._represented(reading, memory)
        scores = torch.einsum("bhd,bnhd->bn", query, keys)
        return kernels.top_k(scores, min(self.top_k, scores.shape[1]))

    def _far_queries(self, reading: Reading, row: int, stop: int) -> Tensor:
        """The queries [b, heads, t, d] at the one distance, float32."""
        rope, unrotated = reading.rope, reading.queries.unrotated
        assert rope is not None
        assert unrotated is not None
        angles = rope.contiguous(self.window + 1, unrotated.device, start=self.window)
        return rope.apply(unrotated[:, :, row:stop].float(), angles)

    def _represented(self, reading: Reading, memory: LocalMass) -> Tensor:
        """What blocks are represented by [b, blocks, heads, d], float32."""
        return torch.stack([memory.held[each].keys for each in reading.rows]).float()

    def _count(self, reading: Reading, memory: LocalMass, row: int, stop: int, near: TokenSet) -> None:
        """Adds up what the queries gave to the tokens in their windows."""
        lse, scaling = reading.answered, reading.scaling
        assert lse is not None
        assert scaling is not None
        passed = Passed(reading.queries.rows(row, stop), lse, reading.first + row, near, scaling)
        if reading.recording:
            for i, each in enumerate(reading.rows):
                memory.note(each, passed.of(i))
        memory.add(reading.segment, reading.rows, passed)
