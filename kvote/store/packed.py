"""Packed lanes: keys, or values, in a few bits, in pages of their own."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from kvote import kernels
from kvote.kernels import packing
from kvote.kernels.choice import packer
from kvote.kernels.contract import Backend, Recent
from kvote.kernels.packing import PACKED, Packing
from kvote.store.pages import Lane, PagePool
from kvote.store.transform import Transform

# Room left behind a lane where it has to move: a 64th of its pages. Growth copies a token 65 times at most, which is
# what an uncompressed token is copied 9 times or so.
_ROOM = 64


class PackedLanes:
    """Keys or values [tokens, d] of each lane in the form of a ``Packing``; lanes are (sequence, key head).

    ``backend``: the kernels that write and read them. ``transform``: what is applied before tokens are packed, and
    undone when they are unpacked.
    """

    def __init__(
        self,
        heads: int,
        form: Packing,
        device: torch.device,
        *,
        backend: Backend,
        transform: Transform | None = None,
    ) -> None:
        self.heads, self.form, self.backend, self.transform = heads, form, backend, transform
        pages = torch.empty(0, form.page_bytes, dtype=torch.uint8, device=device)
        self.pool = PagePool({"pages": pages}, page=PACKED, room=_ROOM)
        self.pool.erasers["pages"] = partial(packing.erase, form)

    @property
    def nbytes(self) -> int:
        return self.pool.nbytes + (0 if self.transform is None else self.transform.nbytes)

    @property
    def token_bytes(self) -> float:
        """Bytes of a token of one lane, room not counted."""
        return self.form.page_bytes / PACKED

    def length(self, row: int) -> int:
        return self.pool.lanes[row * self.heads].length

    def add_sequences(self, count: int) -> None:
        self.pool.lanes += [Lane() for _ in range(count * self.heads)]

    def _lanes(self, rows: Sequence[int]) -> tuple[int, ...]:
        if len(rows) == 1:
            return tuple(range(rows[0] * self.heads, (rows[0] + 1) * self.heads))
        return tuple(row * self.heads + head for row in rows for head in range(self.heads))

    def reserve(self, rows: Sequence[int], tokens: int) -> None:
        """Makes room for ``tokens`` more of some sequences, in one piece where they are empty."""
        chosen = self._lanes(rows)
        if not self.pool.has_room(chosen, tokens):
            targets = [lane.length for lane in self.pool.lanes]
            for i in chosen:
                targets[i] += tokens
            self.pool.grow(targets, room=any(lane.length for lane in self.pool.lanes))

    def append(self, rows: list[int], x: Tensor) -> None:
        """Packs ``x`` [b, h, t, d] behind equally long lanes; keys come in whole groups, behind whole groups."""
        self.reserve(rows, x.shape[2])
        chosen, first = self._lanes(rows), self.length(rows[0])
        x = x if self.transform is None else self.transform.apply(x)
        pages, flat = self.pool.parts["pages"], x.flatten(0, 1)
        packer(self.backend, self.form).packed.pack(
            flat, pages, self.form, self.pool.table(chosen), [first] * len(chosen)
        )
        for i in chosen:
            self.pool.lanes[i].length += x.shape[2]

    def unpack(self, rows: list[int], tokens: range | Tensor, room: int = 0) -> Tensor:
        """Tokens as they decode, [b, h, m + room, d]: a range, or lists int64 [b, m]; with a list for each of several
        query heads per key head, [b, heads, m], as many heads as lists. What lies in the last ``room`` is undefined."""
        pages, form, lanes = self.pool.parts["pages"], self.form, self._lanes(rows)
        sequences, heads, transform = len(rows), self.heads, self.transform
        if transform is not None and transform.mixes and isinstance(tokens, Tensor) and tokens.dim() == 3:
            return self._unpack_mixed(rows, tokens, room)
        m = len(tokens) if isinstance(tokens, range) else tokens.shape[-1]
        if isinstance(tokens, Tensor) and tokens.dim() == 3:
            # A head with a list of its own is a sequence of one head.
            lanes = tuple(lane for lane in lanes for _ in range(tokens.shape[1] // heads))
            sequences, heads, tokens = len(lanes), tokens.shape[1], tokens.reshape(-1, m)
        out = torch.empty(len(lanes), m + room, form.dim, dtype=form.dtype, device=pages.device)
        self.backend.packed.unpack(pages, form, self.pool.table(lanes), tokens, sequences, out)
        out = out.view(len(rows), heads, m + room, form.dim)
        return out if transform is None else transform.undo(out)

    def _unpack_mixed(self, rows: list[int], tokens: Tensor, room: int) -> Tensor:
        """The same for lists of query heads where key heads were mixed: each list is read in all key heads."""
        b, heads, _ = tokens.shape
        each = [self.unpack([row], tokens[i : i + 1, j], room) for i, row in enumerate(rows) for j in range(heads)]
        own = [x[0, j % heads // (heads // self.heads)] for j, x in enumerate(each)]
        return torch.stack(own).view(b, heads, -1, self.form.dim)

    def reads(self, queries_per_kv: int) -> bool:
        """Whether queries of so many heads per key head read codes in place; else, tokens are decoded first."""
        return self.transform is None and queries_per_kv <= self.backend.MAX_QUERIES_PER_KV

    def held(self, rows: list[int], each: int = 0) -> tuple[Tensor, Packing, kernels.Lanes]:
        """As kernels read them; with ``each``, every lane so many times: once for each of its query heads."""
        lanes = self._lanes(rows)
        lanes = tuple(lane for lane in lanes for _ in range(each)) if each else lanes
        return self.pool.parts["pages"], self.form, self.pool.table(lanes)

    def truncate(self, row: int, length: int) -> None:
        for i in self._lanes([row]):
            self.pool.truncate(self.pool.lanes[i], length)

    def select(self, index: list[int]) -> None:
        self.pool.select(self._lanes(index))


def attend(
    query: Tensor,
    keys: PackedLanes,
    values: PackedLanes,
    rows: list[int],
    tokens: range,
    *,
    recent: Recent | None = None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor] | None:
    """Attention [b, heads, t, dv] of a few queries [b, heads, t, d] straight from the codes, and its log-sum-exp; None
    where no kernel can do that. All queries see the ``recent`` tokens, too, which are not packed."""
    t = query.shape[2]
    if t > _STREAMED or keys.form.dim != values.form.dim or values.transform is not None:
        return None
    if not keys.reads(query.shape[1] // keys.heads):
        return None
    held, read = (keys.held(rows), values.held(rows)), keys.backend.packed.attend
    answers = [read(query[:, :, i], *held, tokens, recent=recent, scale=scale, softcap=softcap) for i in range(t)]
    if t == 1:
        return answers[0][0][:, :, None], answers[0][1][:, :, None]
    return torch.stack([out for out, _ in answers], dim=2), torch.stack([lse for _, lse in answers], dim=2)


def scores(query: Tensor, keys: PackedLanes, rows: list[int], tokens: range) -> Tensor:
    """q.k [b, r, heads, n] of ``query`` [b, heads, r, d] with packed keys."""
    if keys.transform is not None:
        blocks = [tokens[i : i + BLOCK] for i in range(0, len(tokens), BLOCK)]
        return torch.cat([kernels.scores(query, keys.unpack(rows, block)) for block in blocks], dim=-1)
    return keys.backend.packed.scores(query, keys.held(rows), tokens).transpose(1, 2)


# Tokens that are decoded at a time.
BLOCK = 4096
# Queries that read the codes one by one; more of them share decoded blocks.
_STREAMED = 4
