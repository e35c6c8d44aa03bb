"""Bodies: a region in which every sequence has an encoded text of its own, never changed once made."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvote import kernels
from kvote.kernels.contract import Answer
from kvote.memory import storage_bytes
from kvote.rope import Angles
from kvote.store.region import PlainRegion, Slots
from kvote.store.segment import Scaling


class Body(Protocol):
    """Tokens of one sequence, encoded. Never changed once made, so copies of a sequence share it.

    ``slots``: a range, or int64 [m] for all key heads, or a list for each of several heads. ``lists``: whether
    ``attend`` answers lists with less work than ``read``.
    """

    lists: bool

    @property
    def positions(self) -> Tensor:
        """Original positions, int32 [h, n]; [1, n] where all key heads always hold the same tokens."""
        ...

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What it holds and no other layer counts."""
        ...

    def read(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """The tokens as full keys [h, m, d] and values [h, m, dv]; with a list for each of several query heads per key
        head, ``slots`` [heads, m], as many heads as lists."""
        ...

    def attend(self, query: Tensor, slots: Slots, angles: Angles | None, scaling: Scaling) -> Answer | None:
        """What queries [heads, t, d], which all see all of ``slots``, read there: [heads, t, dv] and lse [heads, t];
        None where the tokens had better be read first.

        ``angles`` [..., m, r]: places of these tokens, where keys are held at position 0.
        """
        ...

    def scores(self, query: Tensor, start: int, stop: int) -> Tensor:
        """q.k of ``query`` [heads, r, d] as the keys are held: [r, heads, n] in float32."""
        ...

    def keep(self, slots: Tensor, content: tuple[Tensor, Tensor] | None = None) -> "Body":
        """What is left of it: ``slots`` [h, m], holding ``content`` [h, m, ...] if given."""
        ...


class PlainBody:
    """What a body is unless it says otherwise: it is read, and what was read is scored and attended to."""

    lists = False

    def read(self, slots: Slots) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def attend(self, query: Tensor, slots: Slots, angles: Angles | None, scaling: Scaling) -> Answer | None:
        return None

    def scores(self, query: Tensor, start: int, stop: int) -> Tensor:
        return kernels.scores(query[None], self.read(range(start, stop))[0][None])[0]


class Bodies(PlainRegion):
    """As ``Region``: the bodies of all sequences, None of those that have none yet."""

    def __init__(self, heads: int, device: torch.device) -> None:
        self.heads, self.device = heads, device
        self.bodies: list[Body | None] = []

    @property
    def lists(self) -> bool:
        return any(body is not None and body.lists for body in self.bodies)

    @property
    def nbytes(self) -> int:
        return storage_bytes([tensor for body in self.bodies if body is not None for tensor in body.tensors])

    def add_sequences(self, count: int) -> None:
        self.bodies += [None] * count

    def length(self, row: int) -> int:
        body = self.bodies[row]
        return 0 if body is None else body.positions.shape[1]

    def alone(self, row: int) -> int:
        return self.length(row)

    def positions(self, row: int) -> Tensor:
        body = self.bodies[row]
        return torch.empty(1, 0, dtype=torch.int32, device=self.device) if body is None else body.positions

    def _of(self, row: int) -> Body:
        body = self.bodies[row]
        assert body is not None
        return body

    def attend(
        self, query: Tensor, rows: list[int], slots: Slots, angles: Angles | None, scaling: Scaling
    ) -> Answer | None:
        parts = []
        for i, row in enumerate(rows):
            own = slots if isinstance(slots, range) else slots[i]
            turn = angles if angles is None or angles[0].dim() == 2 else (angles[0][i], angles[1][i])
            answer = self._of(row).attend(query[i], own, turn, scaling)
            if answer is None:
                return None
            parts.append(answer)
        return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])

    def scores(self, query: Tensor, rows: list[int], slots: range) -> Tensor:
        return torch.stack([self._of(row).scores(query[i], slots.start, slots.stop) for i, row in enumerate(rows)])

    def decode(self, rows: list[int], slots: Slots, room: int = 0) -> tuple[Tensor, Tensor]:
        each = [self._of(row).read(slots if isinstance(slots, range) else slots[i]) for i, row in enumerate(rows)]
        key, value = (torch.stack(part) for part in zip(*each, strict=True))
        return (pad(key, (0, 0, 0, room)), pad(value, (0, 0, 0, room))) if room else (key, value)

    def holds(self, row: int, slots: Slots, merged: bool) -> tuple[int, int]:
        n = self.length(row)
        # All key heads have equally many tokens here.
        count = min(n, len(slots)) if isinstance(slots, range) else int((slots < n).sum(dim=1).min()) if n else 0
        return count, count

    def keep(self, row: int, slots: Slots, content: tuple[Tensor, Tensor] | None) -> None:
        n, count = self.length(row), self.holds(row, slots, content is not None)[0]
        if isinstance(slots, range):
            if count == n:
                return
            slots = torch.arange(count, device=self.device)[None]
        own = slots[:, :count].expand(self.heads, -1)
        self.bodies[row] = self._of(row).keep(own, content) if count else None

    def select(self, index: list[int]) -> None:
        self.bodies = [self.bodies[i] for i in index]


def head_of(slots: Tensor, heads: int) -> Tensor:
    """The key heads [lists, 1], of ``heads``, that ``slots`` [lists, m] of key heads or of query heads are of."""
    return torch.arange(heads, device=slots.device).repeat_interleave(len(slots) // heads)[:, None]
