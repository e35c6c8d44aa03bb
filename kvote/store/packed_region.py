"""Packed tokens as a region: keys and values in the codes of a ``Codec``, read where they lie or decoded."""

import torch
from torch import Tensor

from kvote.kernels.contract import Answer, Recent, Tail
from kvote.memory import storage_bytes
from kvote.rope import Angles, Rope
from kvote.store import packed
from kvote.store.codec import Codec
from kvote.store.pages import PAGE, PagePool
from kvote.store.region import PlainRegion, Slots, differ, unmoved
from kvote.store.segment import Scaling
from kvote.store.uncompressed import UncompressedSegment
from kvote.tokens import TokenSet


class PackedRegion(PlainRegion):
    """As ``Region``. Keys may be packed ahead of their values: tokens with both are the region's. Groups of tokens are
    not taken apart: what is behind the first token that moves is packed anew by whoever packs."""

    def __init__(self, heads: int, like: Tensor, value_dim: int, codec: Codec) -> None:
        self.heads, self.codec = heads, codec
        self.keys, self.values = codec.lanes(heads, like, value_dim)
        # Of each sequence, positions of the tokens that lie nowhere else, int32 [heads, tokens]; [1, tokens] as long as
        # all key heads hold the same tokens, for which the device would have to be asked.
        self.before: list[Tensor] = []

    @property
    def pools(self) -> list[PagePool]:
        return [self.keys.pool, self.values.pool]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + storage_bytes(self.before)

    def add_sequences(self, count: int) -> None:
        self.keys.add_sequences(count)
        self.values.add_sequences(count)
        self.before += [torch.empty(1, 0, dtype=torch.int32, device=self.keys.pool.device)] * count

    def length(self, row: int) -> int:
        return self.values.length(row)

    def alone(self, row: int) -> int:
        return self.before[row].shape[1]

    def positions(self, row: int) -> Tensor:
        return self.before[row]

    def attend(
        self, query: Tensor, rows: list[int], slots: Slots, angles: Angles | None, scaling: Scaling
    ) -> Answer | None:
        if angles is not None or isinstance(slots, Tensor):
            return None
        return packed.attend(query, self.keys, self.values, rows, slots, scale=scaling.scale, softcap=scaling.softcap)

    def attend_with(
        self, query: Tensor, rows: list[int], slots: range, recent: Recent, scaling: Scaling
    ) -> Answer | None:
        scale, softcap = scaling.scale, scaling.softcap
        return packed.attend(query, self.keys, self.values, rows, slots, recent=recent, scale=scale, softcap=softcap)

    def scores(self, query: Tensor, rows: list[int], slots: range) -> Tensor:
        return packed.scores(query, self.keys, rows, slots)

    def votes(
        self, query: Tensor, rows: list[int], uncompressed: UncompressedSegment, start: int, limits: list[int]
    ) -> Tensor:
        """As ``Segment.votes``, over these tokens and the ``uncompressed`` ones behind them, of any rows."""
        return self.keys.backend.packed.votes(
            query, self.keys.held(rows), self._tail(rows, uncompressed), start, limits
        )

    def winners(
        self, query: Tensor, rows: list[int], uncompressed: UncompressedSegment, start: int, limits: list[int], k: int
    ) -> Tensor:
        """As ``Segment.winners``, in the same way."""
        return self.keys.backend.packed.select(
            query, self.keys.held(rows), self._tail(rows, uncompressed), start, limits, k
        )

    def attend_list(
        self,
        query: Tensor,
        rows: list[int],
        tokens: TokenSet,
        uncompressed: UncompressedSegment,
        rope: Rope | None,
        scaling: Scaling,
    ) -> Answer | None:
        """Attention of ``query`` [b, heads, 1, d], each sequence or each query head reading a list of these tokens and
        of the ``uncompressed`` ones behind them; None where no kernel can do that."""
        b, heads, t, d = query.shape
        placed = rope is None or tokens.positions == "contiguous"
        seen = tokens.window is None or tokens.window >= len(tokens)
        # To the kernel, a head with a list of its own is a sequence of one head.
        each = heads // self.heads if tokens.by_head else 0
        reads = self.keys.form.dim == self.values.form.dim and self.keys.reads(1 if each else heads // self.heads)
        if t != 1 or isinstance(tokens.index, range) or not (placed and seen and reads):
            return None
        out, lse = self.keys.backend.packed.decode(
            query.reshape(-1, 1, d) if each else query[:, :, 0],
            self.keys.held(rows, each),
            self.values.held(rows, each),
            self._tail(rows, uncompressed, each),
            tokens.index[..., 0, :].reshape(-1, len(tokens)).contiguous(),
            angles=uncompressed.angles(tokens),
            interleaved=rope is not None and rope.interleaved,
            scale=scaling.scale,
            softcap=scaling.softcap,
        )
        return out.to(query.dtype).view(b, heads, 1, -1), lse.view(b, heads, 1)

    def _tail(self, rows: list[int], uncompressed: UncompressedSegment, each: int = 0) -> Tail:
        """What is not packed, as kernels read it behind what is; ``each`` as in ``PackedLanes.held``."""
        times = max(1, each * self.heads)
        counts = [(self.length(row), self.alone(row)) for row in rows for _ in range(times)]
        return Tail(*uncompressed.held(rows, each), [n for n, _ in counts], [first for _, first in counts])

    def decode(self, rows: list[int], slots: Slots, room: int = 0) -> tuple[Tensor, Tensor]:
        return self.keys.unpack(rows, slots, room), self.values.unpack(rows, slots, room)

    def holds(self, row: int, slots: Slots, merged: bool) -> tuple[int, int]:
        return self._rest(row, 0 if merged else unmoved(slots))[1:]

    def _rest(self, row: int, start: int) -> tuple[int, int, int]:
        """How many keys, whole tokens, and tokens that lie nowhere else are left where those from ``start`` on move."""
        keys, values, alone = self.keys.length(row), self.values.length(row), self.alone(row)
        if start < keys:
            keys = start // self.codec.run * self.codec.run
        if keys >= values:
            return keys, values, alone
        return keys, keys, min(alone, keys) // PAGE * PAGE

    def keep(self, row: int, slots: Slots, content: tuple[Tensor, Tensor] | None) -> None:
        keys, values, alone = self._rest(row, 0 if content is not None else unmoved(slots))
        before = self.before[row]
        if len(before) == 1 and differ(slots):
            before = before.expand(self.heads, -1)
        if alone < before.shape[1] or before is not self.before[row]:
            self.before[row] = before[:, :alone].clone()
        self.keys.truncate(row, keys)
        self.values.truncate(row, values)

    def leave(self, row: int, positions: Tensor) -> None:
        """The next tokens, which are packed, now lie here alone; their ``positions`` int32 are those of each key head,
        or [1, tokens] where they are the same."""
        before = self.before[row]
        self.before[row] = torch.cat([before, positions], dim=1) if before.shape[1] else positions.clone()

    def select(self, index: list[int]) -> None:
        self.keys.select(index)
        self.values.select(index)
        self.before = [self.before[i] for i in index]
