"""Attention that a prompt receives while the model reads it again."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote.keep.keeper import Held
from kvote.keep.observation import Observation
from kvote.keep.score.score import Score
from kvote.keep.turned import keys_in_place
from kvote.memory import storage_bytes
from kvote.numbers import check_whole

# Float32 weights (16 MiB) that are held at a time.
_WEIGHTS_HELD = 1 << 22


@dataclass
class Repeated:
    """By sequence: what its first tokens received so far (``received``, float32 [h, n]), and, once all have been read
    again, how many these were (``heard``); ``due``: sequences that hold too much because they were not.

    Tensors are never changed in place, so sequences may share them.
    """

    received: dict[int, Tensor] = field(default_factory=dict)
    heard: dict[int, int] = field(default_factory=dict)
    due: set[int] = field(default_factory=set)

    def whole(self, held: Held) -> bool:
        """Whether all that is held has been read again."""
        return held.row in self.received and self.received[held.row].shape[1] == held.length

    def select(self, index: list[int]) -> None:
        self.received = {i: self.received[old] for i, old in enumerate(index) if old in self.received}
        self.heard = {i: self.heard[old] for i, old in enumerate(index) if old in self.heard}
        self.due = {i for i, old in enumerate(index) if old in self.due}

    def keep(self, row: int, slots: Tensor) -> None:
        self.heard[row] = slots.shape[-1]

    def truncate(self, row: int, length: int) -> None:
        if row in self.received:
            self.received[row] = self.received[row][:, :length].clone()
        if self.heard.get(row, 0) > length:
            del self.heard[row]

    @property
    def nbytes(self) -> int:
        return storage_bytes(self.received.values())


@dataclass(frozen=True, kw_only=True)
class ReadAgain(Score):
    """The most attention that any query of a repeat paid, in any query head of a key head. Tokens are read again
    ``echo`` at a time; a softmax goes over the first ``sinks`` tokens, those repeated, and the repeat itself."""

    echo: int
    sinks: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, echo=1, sinks=0)

    def new_memory(self) -> Repeated:
        return Repeated()

    def due(self, memory: Repeated | None) -> bool:
        return memory is not None and bool(memory.due)

    def observe(self, seen: Observation, memory: Repeated) -> None:
        assert seen.repeats is not None
        for i, row in enumerate(seen.rows):
            chunk = seen.repeats[row]
            most = self._most(seen, i, chunk)
            before = memory.received.get(row, most)[:, : chunk.start]
            memory.received[row] = torch.cat([before, most], dim=1)

    def _most(self, seen: Observation, i: int, chunk: range) -> Tensor:
        """The largest weight [h, n] that each token of ``chunk`` received from the i-th sequence of a pass."""
        row, t, h = seen.rows[i], seen.count, seen.segment.heads
        rope = None if seen.queries.raw is None else seen.rope
        sinks = range(min(self.sinks, chunk.start))
        parts = [(r.start, r.stop) for r in (sinks, chunk, range(seen.first, seen.first + t)) if len(r)]
        key = torch.cat([keys_in_place(seen.segment, row, a, z, rope) for a, z in parts], dim=1).transpose(1, 2)
        queries = seen.queries.rotated[i].float() * seen.logits.scale
        queries = queries.reshape(h, -1, t, queries.shape[-1])
        before, most = key.shape[2] - t, key.new_zeros(h, len(chunk))
        step = max(1, _WEIGHTS_HELD // (queries.shape[0] * queries.shape[1] * key.shape[2]))
        at = torch.arange(key.shape[2], device=key.device)
        for a in range(0, t, step):
            z = min(t, a + step)
            logits = queries[:, :, a:z] @ key[:, None]
            if seen.logits.softcap is not None:
                logits = seen.logits.softcap * torch.tanh(logits / seen.logits.softcap)
            unseen = at[None] > torch.arange(before + a, before + z, device=key.device)[:, None]
            weights = logits.masked_fill(unseen, float("-inf")).softmax(dim=-1)
            most = torch.maximum(most, weights[..., len(sinks) : len(sinks) + len(chunk)].amax(dim=(1, 2)))
        return most

    def ended(self, held: Held, memory: Repeated) -> bool:
        waits = held.row not in memory.heard and not held.generated
        return waits or held.row in memory.due or memory.whole(held)

    def of(self, held: Held, memory: Repeated, edge: int) -> Tensor | None:
        return memory.received[held.row] if memory.whole(held) else None

    def settled(self, held: Held, memory: Repeated, over: bool) -> None:
        memory.due.discard(held.row)
        if over:
            memory.due.add(held.row)
        if memory.whole(held):
            memory.heard[held.row] = held.length
            del memory.received[held.row]
