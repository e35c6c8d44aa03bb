"""Regions side by side: which of them tokens lie in, and how tokens of several are put together."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvote.rope import Rope
from kvote.store.pages import PagePool
from kvote.store.region import Region
from kvote.store.segment import NO_INDEXES
from kvote.store.uncompressed import UncompressedSegment
from kvote.tokens import TokenSet


class Regions:
    """Tokens of a layer: encoded ``regions``, one after the other, and behind them the most recent tokens,
    ``uncompressed``, as the model made them. With a ``rope``, keys are held at position 0 and rotated when they are
    read.

    Of each sequence, the uncompressed pages begin with the first token that does not lie in a region alone. In what
    takes ``rows``, these are sequences that hold equally many tokens in each region, unless it says otherwise.
    """

    indexes = NO_INDEXES
    skips = False

    def __init__(self, heads: int, like: Tensor, value_dim: int, rope: Rope | None, regions: list[Region]) -> None:
        self.heads, self.rope, self.regions = heads, rope, regions
        self.uncompressed = UncompressedSegment(heads, like, value_dim, rope)

    @property
    def sequences(self) -> int:
        return self.uncompressed.sequences

    @property
    def device(self) -> torch.device:
        return self.uncompressed.device

    @property
    def pools(self) -> list[PagePool]:
        return [self.uncompressed.pool, *(pool for region in self.regions for pool in region.pools)]

    @property
    def nbytes(self) -> int:
        return self.uncompressed.nbytes + sum(region.nbytes for region in self.regions)

    def encoded(self, row: int) -> int:
        """How many tokens, the first ones, are encoded."""
        return sum([region.length(row) for region in self.regions])

    def begin(self, row: int) -> int:
        """The token with which the uncompressed pages begin."""
        return sum([region.alone(row) for region in self.regions])

    def length(self, row: int) -> int:
        return self.begin(row) + self.uncompressed.length(row)

    def by_form(
        self, rows: list[int], call: Callable[[list[int], slice | list[int]], tuple[Tensor, ...]]
    ) -> list[Tensor]:
        """Joins, in the order of any ``rows``, what ``call`` gives for rows that hold equally many tokens in each
        region, and where these stand among all."""
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, row in enumerate(rows):
            form = tuple(count for region in self.regions for count in (region.length(row), region.alone(row)))
            alike.setdefault(form, []).append(i)
        if len(alike) == 1:
            return list(call(rows, slice(None)))
        each = [call([rows[i] for i in some], some) for some in alike.values()]
        order = torch.tensor([i for some in alike.values() for i in some], device=self.device).argsort()
        return [torch.cat(part)[order] for part in zip(*each, strict=True)]

    def pieces(self, row: int, start: int, stop: int) -> Iterator[tuple[Region, range, int]]:
        """The regions in which tokens ``start`` to ``stop`` lie, the slots there, and the token that is slot 0."""
        offset = 0
        for region in self.regions:
            n = region.length(row)
            slots = range(max(start - offset, 0), min(stop - offset, n))
            if slots:
                yield region, slots, offset
            offset += n

    def tokens(self, rows: list[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys [b, h, n, d] and values [b, h, n, dv] as they are held, decoded where they are encoded."""
        n, begin = self.encoded(rows[0]), self.begin(rows[0])
        parts = [region.decode(rows, slots) for region, slots, _ in self.pieces(rows[0], start, stop)]
        if stop > n or not parts:
            parts.append(self.uncompressed.decode(rows, max(start, n) - begin, max(stop, n) - begin))
        if len(parts) == 1:
            return parts[0]
        return torch.cat([key for key, _ in parts], dim=2), torch.cat([value for _, value in parts], dim=2)

    def listed(self, rows: list[int], index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [b, h, m, c], as they are held, of one list [b, m] per sequence, or [b, heads, m] per query
        head, which makes h as many heads."""
        row, m, out = rows[0], index.shape[-1], None
        # Lists ascend: of the tokens before ``offset``, each list has at least ``least`` and at most ``most``.
        offset = least = most = 0
        for region in self.regions:
            n = region.length(row)
            if not n:
                continue
            counts = (index < offset + n).sum(dim=-1)
            fewest, many = int(counts.min()), int(counts.max())
            if many > least:
                here = index[..., least:many]
                slots = (here - offset if offset else here).clamp(min=0, max=n - 1).contiguous()
                if out is None:
                    out = region.decode(rows, slots, m - many)
                else:
                    where = None if least == most else here >= offset
                    _write(out, slice(least, many), region.decode(rows, slots), where)
            offset, least, most = offset + n, fewest, many
        if least == m and out is not None:
            return out
        late = index[..., least:]
        recent = (late - self.begin(row)).clamp(min=0)[..., None, :]
        new = self.uncompressed.read(rows, TokenSet(recent))[:2]
        if out is None:
            return new
        _write(out, slice(least, m), new, None if least == most else late >= offset)
        return out

    def positions(self, row: int) -> list[Tensor]:
        before = [region.positions(row).expand(self.heads, -1) for region in self.regions]
        return [torch.cat(parts) for parts in zip(*before, self.uncompressed.positions(row), strict=True)]

    def places(self, rows: list[int]) -> Tensor:
        """Original positions [b, h, n]; [b, 1, n] where all key heads hold the same tokens."""
        kinds = 1
        for row in rows:
            kinds = max([kinds, *(len(region.positions(row)) for region in self.regions if region.length(row))])
        each = []
        for row in rows:
            before = [region.positions(row).expand(kinds, -1) for region in self.regions]
            each.append(torch.cat([*before, torch.stack(self.uncompressed.positions(row)[:kinds])], dim=1))
        return torch.stack(each)


def _write(held: tuple[Tensor, Tensor], at: slice, new: tuple[Tensor, Tensor], where: Tensor | None) -> None:
    """Puts ``new`` tokens [b, h, m, c] into some columns of ``held`` ones, if given only ``where`` [b, m] or
    [b, h, m]."""
    if where is not None:
        where = (where if where.dim() == 3 else where[:, None])[..., None]
    for old, fresh in zip(held, new, strict=True):
        last = old[:, :, at]
        last.copy_(fresh if where is None else torch.where(where, fresh, last))
