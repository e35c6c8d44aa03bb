"""Tokens on a disk as a region: as the model made them, in blocks of a file, fetched when they are read."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvote import kernels
from kvote.memory import storage_bytes
from kvote.store.packed import BLOCK
from kvote.store.pages import PAGE
from kvote.store.region import PlainRegion, Slots, differ, unmoved
from kvote.store.spill import Block, Spill, as_bytes


class DiskRegion(PlainRegion):
    """As ``Region``. A block holds ``PAGE`` tokens of one sequence: all keys, then all values, each token's heads side
    by side, so that a token that all heads read is fetched in one piece. Blocks are never changed: what is behind the
    first token that moves is read back and written anew by whoever writes."""

    def __init__(self, heads: int, like: Tensor, value_dim: int, folder: str) -> None:
        self.heads, self.dims, self.dtype, self.device = heads, (like.shape[-1], value_dim), like.dtype, like.device
        # Bytes of the keys and of the values of a token.
        self.sizes = [heads * dim * like.dtype.itemsize for dim in self.dims]
        self.spill = Spill(folder, PAGE * sum(self.sizes))
        self.blocks: list[list[Block]] = []
        # Original positions int32 [1, n] of each sequence; [heads, n] once its key heads hold different tokens.
        self.places: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        content = [self.decode([row], range(self.length(row))) for row in range(len(self.blocks))]
        return {**vars(self), "spill": (self.spill.folder, self.spill.block), "blocks": content}

    def __setstate__(self, state: dict[str, Any]) -> None:
        content = state.pop("blocks")
        self.__dict__.update(state, spill=Spill(*state["spill"]), blocks=[[] for _ in content])
        for row, (key, value) in enumerate(content):
            self.write(row, key[0], value[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> "DiskRegion":
        clone = memo[id(self)] = object.__new__(type(self))
        clone.__dict__.update(vars(self), blocks=[list(each) for each in self.blocks], places=list(self.places))
        return clone

    @property
    def nbytes(self) -> int:
        """In main memory: positions, and where blocks lie."""
        return storage_bytes(self.places) + sum(HANDLE * len(each) for each in self.blocks)

    def add_sequences(self, count: int) -> None:
        self.blocks += [[] for _ in range(count)]
        self.places += [torch.empty(1, 0, dtype=torch.int32, device=self.device)] * count

    def length(self, row: int) -> int:
        return PAGE * len(self.blocks[row])

    def alone(self, row: int) -> int:
        return self.length(row)

    def positions(self, row: int) -> Tensor:
        return self.places[row]

    def write(self, row: int, key: Tensor, value: Tensor) -> None:
        """Adds tokens, keys [h, n, d] and values [h, n, dv]; n is a multiple of ``PAGE``. Raises StorageError."""
        if not key.shape[1]:
            return
        parts = [
            as_bytes(part.transpose(0, 1)).reshape(-1, PAGE * part.shape[0] * part.shape[2] * part.itemsize)
            for part in (key, value)
        ]
        self.blocks[row] += self.spill.put(torch.cat(parts, dim=1))

    def leave(self, row: int, positions: Tensor) -> None:
        """The ``positions`` int32 [1 or h, n] of the tokens that were written last."""
        kinds = max(len(self.places[row]), len(positions)) if self.places[row].shape[1] else len(positions)
        self.places[row] = torch.cat([self.places[row].expand(kinds, -1), positions.expand(kinds, -1)], dim=1)

    def _fetch(self, side: int, row: int, slots: np.ndarray, into: Tensor) -> None:
        """Keys (0) or values (1) of tokens, into [n, heads, dim]."""
        numbers = np.array([block.number for block in self.blocks[row]], np.int64)
        size = self.sizes[side]
        at = numbers[slots // PAGE] * self.spill.block + (PAGE * self.sizes[0] if side else 0)
        self.spill.get(at + slots % PAGE * size, into.view(torch.uint8).view(len(slots), size))

    def side(self, side: int, rows: list[int], slots: Slots, room: int = 0) -> Tensor:
        """Keys or values [b, h, m + room, c] in the model's dtype."""
        dim, own = self.dims[side], isinstance(slots, Tensor) and slots.dim() == 3
        m = slots.shape[-1] if isinstance(slots, Tensor) else len(slots)
        heads = slots.shape[1] if isinstance(slots, Tensor) and own else self.heads
        # Token by token, as the file has them.
        out = torch.empty(len(rows), m + room, heads, dim, dtype=self.dtype)
        for i, row in enumerate(rows):
            if isinstance(slots, range):
                self._fetch(side, row, np.arange(slots.start, slots.stop), out[i, :m])
            elif not own:
                self._fetch(side, row, slots[i].cpu().numpy(), out[i, :m])
            else:
                some, where = np.unique(slots[i].cpu().numpy(), return_inverse=True)
                each = torch.empty(len(some), self.heads, dim, dtype=self.dtype)
                self._fetch(side, row, some, each)
                of = torch.arange(self.heads).repeat_interleave(heads // self.heads)
                out[i, :m] = each[torch.from_numpy(where.reshape(heads, m)).T, of]
        return out.to(self.device).transpose(1, 2)

    def decode(self, rows: list[int], slots: Slots, room: int = 0) -> tuple[Tensor, Tensor]:
        return self.side(0, rows, slots, room), self.side(1, rows, slots, room)

    def scores(self, query: Tensor, rows: list[int], slots: range) -> Tensor:
        parts = [range(i, min(i + BLOCK, slots.stop)) for i in range(slots.start, slots.stop, BLOCK)]
        return torch.cat([kernels.scores(query, self.side(0, rows, part)) for part in parts], dim=-1)

    def holds(self, row: int, slots: Slots, merged: bool) -> tuple[int, int]:
        if merged:
            return 0, 0
        count = min(unmoved(slots), self.length(row)) // PAGE * PAGE
        return count, count

    def keep(self, row: int, slots: Slots, content: tuple[Tensor, Tensor] | None) -> None:
        count = self.holds(row, slots, content is not None)[0]
        if differ(slots):
            # Also those of the tokens behind, which go by how many kinds there are here.
            self.places[row] = self.places[row].expand(self.heads, -1)
        if count < self.length(row):
            self.blocks[row] = self.blocks[row][: count // PAGE]
            self.places[row] = self.places[row][:, :count].clone()
            self.spill.trim()

    def select(self, index: list[int]) -> None:
        self.blocks = [list(self.blocks[i]) for i in index]
        self.places = [self.places[i] for i in index]
        self.spill.trim()


# Bytes of a block's handle and of the list that it is in.
HANDLE = 56
