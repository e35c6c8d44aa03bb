"""Attention that a prompt receives while the model reads it again."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote import kernels
from kvote.keep.keeper import Held
from kvote.keep.observation import Observation
from kvote.keep.rotated_keys import rotated_keys
from kvote.keep.score.score import Score
from kvote.memory import storage_bytes
from kvote.needs import Needs
from kvote.numbers import check_whole
from kvote.tokens import TokenSet

# Float32 logits (4 MiB) that are held at a time.
_LOGITS_HELD = 1 << 20


@dataclass
class RepeatMemory:
    """By sequence: what its first tokens received so far (``received``, float32 [h, n]), and, once all have been read
    again, how many these were (``judged``); ``due``: sequences that hold too much because they were not; ``shares``:
    tokens that a layer may hold, where layers compete.

    Tensors are never changed in place, so sequences may share them.
    """

    received: dict[int, Tensor] = field(default_factory=dict)
    judged: dict[int, int] = field(default_factory=dict)
    due: set[int] = field(default_factory=set)
    shares: dict[int, int] = field(default_factory=dict)

    def whole(self, held: Held) -> bool:
        """Whether all that is held has been read again."""
        return held.row in self.received and self.received[held.row].shape[1] == held.length

    def select(self, index: list[int]) -> None:
        self.received = {i: self.received[old] for i, old in enumerate(index) if old in self.received}
        self.judged = {i: self.judged[old] for i, old in enumerate(index) if old in self.judged}
        self.due = {i for i, old in enumerate(index) if old in self.due}
        self.shares = {i: self.shares[old] for i, old in enumerate(index) if old in self.shares}

    def keep(self, row: int, slots: Tensor) -> None:
        self.judged[row] = slots.shape[-1]

    def truncate(self, row: int, length: int) -> None:
        if row in self.received:
            self.received[row] = self.received[row][:, :length].clone()
        if self.judged.get(row, 0) > length:
            del self.judged[row]

    @property
    def nbytes(self) -> int:
        return storage_bytes(self.received.values())


@dataclass(frozen=True, kw_only=True)
class RepeatAttention(Score):
    """The most attention that any query of a repeat paid, in any query head of a key head. Tokens are read again
    ``chunk`` at a time; a softmax goes over the first ``sinks`` tokens, those repeated, and the repeat itself."""

    chunk: int
    sinks: int
    # Tokens are judged once, when all key heads hold equally many.
    uneven = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, chunk=1, sinks=0)

    @property
    def needs(self) -> Needs:
        return Needs(repeat_chunk=self.chunk)

    def new_memory(self) -> RepeatMemory:
        return RepeatMemory()

    def due(self, memory: RepeatMemory | None) -> bool:
        return memory is not None and bool(memory.due)

    def observe(self, seen: Observation, memory: RepeatMemory) -> None:
        assert seen.repeats is not None
        for i, row in enumerate(seen.rows):
            chunk = seen.repeats[row]
            most = self._most(seen, i, chunk)
            before = memory.received.get(row, most)[:, : chunk.start]
            memory.received[row] = torch.cat([before, most], dim=1)

    def _most(self, seen: Observation, i: int, chunk: range) -> Tensor:
        """The largest weight [h, n] that each token of ``chunk`` received from the i-th sequence of a pass."""
        row, t, h = seen.rows[i], seen.count, seen.segment.heads
        if not len(chunk):
            return torch.zeros(h, 0, device=seen.lse.device)
        queries = seen.queries.of_sequences(slice(i, i + 1))
        own = range(seen.first, seen.first + t)
        sets = [TokenSet(part, causal=part is own) for part in (range(min(self.sinks, chunk.start)), chunk, own)]
        answers = [seen.segment.attend(queries, [row], part, seen.scaling) for part in sets if len(part)]
        total = kernels.merge(answers)[1][0].reshape(h, -1, t, 1)
        key = rotated_keys(seen.segment, row, chunk.start, chunk.stop, None if queries.unrotated is None else seen.rope)
        query = queries.rotated[0].float().reshape(h, -1, t, key.shape[2]) * seen.scaling.scale
        most = torch.full((h, len(chunk)), float("-inf"), device=key.device)
        step = max(1, _LOGITS_HELD // (query.shape[0] * query.shape[1] * len(chunk)))
        for a in range(0, t, step):
            logits = query[:, :, a : a + step] @ key[:, None].transpose(2, 3)
            if seen.scaling.softcap is not None:
                logits = logits.div_(seen.scaling.softcap).tanh_().mul_(seen.scaling.softcap)
            most = torch.maximum(most, logits.sub_(total[:, :, a : a + step]).amax(dim=(1, 2)))
        return most.exp()

    def ended(self, held: Held, memory: RepeatMemory) -> bool:
        waits = held.row not in memory.judged and not held.generated
        return waits or held.row in memory.due or memory.whole(held)

    def of(self, held: Held, memory: RepeatMemory, edge: int) -> Tensor | None:
        return memory.received[held.row] if memory.whole(held) else None

    def settled(self, held: Held, memory: RepeatMemory, over: bool) -> None:
        memory.due.discard(held.row)
        if memory.whole(held):
            memory.judged[held.row] = held.length
            del memory.received[held.row]
        elif over:
            memory.due.add(held.row)
