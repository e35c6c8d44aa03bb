"""Pages: where the tokens of one layer lie in memory.

A lane (one key/value head of one sequence) owns pages of ``PAGE`` tokens out of a pool that all lanes of the layer
share. Uncompressed pages hold keys, values and original positions side by side, so a token that moves takes its
position with it. Sequences that start alike (beams, several answers to one prompt) own the same pages until one of them
writes.

Each lane's pages are runs of neighbours in the pool. ``arrange`` lays every lane out in one run with room to grow,
which is the usual state: a lane then is a plain strided tensor and reading it copies nothing.
"""

import copy
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvote import kernels
from kvote.errors import InterruptedPassError
from kvote.kernels.lanes import PAGE as PAGE
from kvote.store.family import FORK, Family, counted
from kvote.store.lane import NO_PAGES, stretches
from kvote.store.lane import Lane as Lane

# Room left behind a lane when the pool is laid out anew: an eighth of its pages. Growth copies a token 9 times at most.
_ROOM = 8
# Pages per lane that may lie unused besides that room.
_UNUSED = 2
# Bytes of tables per page at most: its owners, and a run of its own.
_TABLES = 20


class PagePool:
    """Named ``parts``, tensors [pages, ...] that hold ``page`` tokens each, and how many lanes own a page.

    ``room``: where lanes are laid out anew with room to grow, as many times the pages left behind a lane it has.
    """

    def __init__(self, parts: dict[str, Tensor], *, page: int = PAGE, room: int = _ROOM) -> None:
        self.parts = parts
        # Where tokens do not lie one after the other in a part: what makes zeros of a page from a token on.
        self.erasers: dict[str, Callable[[Tensor, int], None]] = {}
        self.page, self.room = page, room
        self.owners = np.zeros(0, np.int32)
        self.lanes: list[Lane] = []
        # Whether some parts are laid out anew and others not yet: true for good where that was interrupted.
        self.moving = False
        # Whether lanes were ever copied, so that a page may have several owners.
        self.shares = False
        # Tables for the kernels, until a page changes hands.
        self._tables: dict[tuple[int, ...], kernels.Lanes] = {}
        # The pools that this one shares ``parts`` and ``owners`` with, itself among them; None: it has them alone.
        self._family: Family | None = None

    def __deepcopy__(self, memo: dict[Any, Any]) -> "PagePool":
        """A pool of its own; of a fork, one that shares the pages until one of both writes to them."""
        clone = memo[id(self)] = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        clone._tables = {}
        if FORK in memo:
            for lane in self.lanes:
                # Pages set aside but not yet written are not shared: two lanes would write into them.
                self.truncate(lane, lane.length)
        clone.lanes = [Lane(list(lane.runs), lane.length) for lane in self.lanes]
        if FORK in memo:
            if self._family is None:
                self._family = Family()
                self._family.add(self)
            clone._family = self._family
            clone._family.add(clone)
            self.shares = clone.shares = True
            self._family.recount()
            return clone
        clone.parts, clone.owners = copy.deepcopy(self.parts, memo), self.owners.copy()
        if self._family is not None:
            clone._family = Family()
            clone._family.add(clone)
            clone._family.recount()
            clone._family = None
            clone.trim()
        return clone

    def __getstate__(self) -> dict[str, Any]:
        return vars(self if self._family is None else copy.deepcopy(self))

    @property
    def _pools(self) -> "list[PagePool]":
        """This pool first, and those that share its pages."""
        others = [] if self._family is None else [pool for pool in self._family.pools if pool is not self]
        return [self, *others]

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    @property
    def nbytes(self) -> int:
        tables = self.owners.nbytes + 16 * sum(len(lane.runs) for lane in self.lanes)
        tables += sum(table.nbytes for lanes in self._tables.values() for table in lanes.tables.values())
        pages = sum(part.untyped_storage().nbytes() for part in self.parts.values())
        if self._family is None:
            return tables + pages
        families = counted.get()
        if families is None:
            # Of a fork, all that would stay if the others went: its pages, shared ones among them, and unused ones.
            held = np.zeros(len(self.owners), bool)
            for lane in self.lanes:
                held[lane.page_ids()] = True
            return tables + pages - int(((self.owners > 0) & ~held).sum()) * (self._page_bytes - _TABLES)
        pages = 0 if id(self._family) in families else pages
        families.add(id(self._family))
        return tables + pages

    def table(self, lanes: tuple[int, ...]) -> kernels.Lanes:
        """Where some lanes lie, as the compiled kernels read it."""
        if lanes not in self._tables:
            self._tables[lanes] = kernels.Lanes([self.lanes[i].runs for i in lanes])
        return self._tables[lanes]

    def has_room(self, lanes: tuple[int, ...], tokens: int) -> bool:
        """Whether each lane can take ``tokens`` more without a new page, and owns the page it writes next alone."""
        if self._family is not None and (self.moving or self._family.lost_some):
            return False
        for i in lanes:
            lane = self.lanes[i]
            if lane.length + tokens > lane.pages * self.page:
                return False
            if lane.length % self.page and self.owners[self._last_page(lane)] > 1:
                return False
        return True

    def slots(self, lane: Lane, start: int, stop: int) -> Tensor:
        """Pool slots (page times its size, plus offset) of tokens ``start`` to ``stop``, int64 [stop - start]."""
        device = self.device
        if len(lane.runs) == 1:
            base = lane.runs[0][0] * self.page
            return torch.arange(base + start, base + stop, device=device)
        token = torch.arange(start, stop, device=device)
        pages = torch.from_numpy(lane.page_ids()).to(device)
        return pages[token // self.page] * self.page + token % self.page

    def grow(self, targets: list[int], *, room: bool = True) -> None:
        """Gives every lane the pages for ``targets[lane]`` tokens, and sole ownership of the page it writes next.

        ``room``: leave more behind each lane if the pool has to be laid out anew.
        """
        if self._family is not None:
            if self.moving:
                raise InterruptedPassError(
                    "Pages that this cache shares with a fork were being moved when that was interrupted; call "
                    "cache.reset() and feed the text again."
                )
            if self._family.lost_some:
                self._family.recount()
                self.trim()
        for lane, target in zip(self.lanes, targets, strict=True):
            if target > lane.length and lane.length % self.page and self.owners[self._last_page(lane)] > 1:
                self._copy_last_page(lane, targets)
        wanted = [
            max(0, -(-target // self.page) - lane.pages) for lane, target in zip(self.lanes, targets, strict=True)
        ]
        if sum(wanted) == 0:
            return
        cramped = any(not self._room_behind(lane, w) for lane, w in zip(self.lanes, wanted, strict=True) if w)
        shared = len(self.owners) > 0 and self.owners.max() > 1
        # Lanes that share pages cannot all lie in one run, so laying them out anew would buy nothing.
        if (cramped and not shared) or int((self.owners == 0).sum()) < sum(wanted):
            self.arrange(wanted, room=room)
        for lane, want in zip(self.lanes, wanted, strict=True):
            self._take(lane, want)

    def arrange(self, more: list[int], *, room: bool = True) -> None:
        """Lays the pool out anew: each lane in one run, then ``more[lane]`` free pages and, if asked, room to grow.

        Shared pages stay shared: they lie with the first lane that owns them.
        """
        pools = self._pools
        lanes = [lane for pool in pools for lane in pool.lanes]
        more = more + [0] * (len(lanes) - len(more))
        moved = np.full(len(self.owners), -1, np.int64)
        sources: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        cursor = 0
        starts = []
        for lane, extra in zip(lanes, more, strict=True):
            ids = lane.page_ids()
            fresh = ids[moved[ids] < 0]
            moved[fresh] = np.arange(cursor, cursor + len(fresh))
            sources.append(fresh)
            targets.append(moved[fresh])
            starts.append(cursor + len(fresh))
            cursor += len(fresh) + extra + ((lane.pages + extra) // self.room if room and extra else 0)
        old, new = np.concatenate([*sources, NO_PAGES]), np.concatenate([*targets, NO_PAGES])
        owners = np.zeros(cursor, np.int32)
        owners[new] = self.owners[old]
        runs = []
        for lane, start in zip(lanes, starts, strict=True):
            ids = moved[lane.page_ids()]
            # A lane without pages yet still has its place reserved: a run of no pages marks it.
            runs.append([(int(t), c) for _, t, c in stretches(ids, ids)] or [(start, 0)])
        # One after the other, so that no more than one part exists twice. Memory is scarcest for the first, before
        # anything has changed.
        # Where others share them all exist twice, so that an interruption leaves these as they are.
        together = {name: self._laid_out(part, old, new, cursor) for name, part in self.parts.items() if pools[1:]}
        for name, part in self.parts.items():
            fresh = together.get(name)
            fresh = self._laid_out(part, old, new, cursor) if fresh is None else fresh
            for pool in pools:
                pool.moving = True
            self.parts[name] = fresh
        for pool in pools:
            pool.owners = owners
            pool._tables.clear()
        for lane, own in zip(lanes, runs, strict=True):
            lane.runs = own
        for pool in pools:
            pool.moving = False

    def _laid_out(self, part: Tensor, old: np.ndarray, new: np.ndarray, pages: int) -> Tensor:
        """A copy with room for ``pages``, in which the pages ``old`` are ``new`` ones."""
        fresh = torch.empty(pages, *part.shape[1:], dtype=part.dtype, device=part.device)
        kernels.use_large_pages(fresh)
        for source, target, count in stretches(old, new):
            fresh[target : target + count] = part[source : source + count]
        return fresh

    def truncate(self, lane: Lane, length: int) -> None:
        """Forgets the lane's tokens from ``length`` on and frees the pages that held only them."""
        spare = lane.pages - -(-length // self.page)
        lane.length = length
        if spare > 0:
            self._tables.clear()
        while spare > 0:
            first, count = lane.runs.pop()
            cut = min(spare, count)
            self.owners[first + count - cut : first + count] -= 1
            spare -= cut
            if count > cut or not lane.runs:
                lane.runs.append((first, count - cut))

    def drop_front(self, lane: Lane, pages: int) -> None:
        """Forgets the first ``pages`` pages of tokens of a lane."""
        if pages:
            self._tables.clear()
        lane.length -= pages * self.page
        while pages:
            first, count = lane.runs.pop(0)
            cut = min(pages, count)
            self.owners[first : first + cut] -= 1
            pages -= cut
            if count > cut or not lane.runs:
                lane.runs.insert(0, (first + cut, count - cut))

    def trim(self) -> None:
        """Gives unused pages back if they are more than the usual room."""
        used = int((self.owners > 0).sum())
        if len(self.owners) - used > used // self.room + _UNUSED * len(self.lanes):
            self.arrange([0] * len(self.lanes))

    def tokens_within(self, nbytes: float, extra_bytes: int = 0) -> int:
        """Tokens that each lane may hold for the pool to take ``nbytes`` at most, unused pages included, and as many
        times ``extra_bytes`` elsewhere."""
        pages = nbytes / (self._page_bytes + self.page * extra_bytes) / max(1, len(self.lanes))
        return max(0, int((pages - _UNUSED) * self.room / (self.room + 1))) * self.page

    def bytes_within(self, tokens: int) -> float:
        """What the pool takes at most when each lane holds ``tokens``, unused pages included."""
        pages = -(-tokens // self.page)
        return len(self.lanes) * (pages * (self.room + 1) / self.room + _UNUSED) * self._page_bytes

    @property
    def _page_bytes(self) -> int:
        """Bytes of a page, and of the tables that name it."""
        return _TABLES + sum(prod(part.shape[1:]) * part.element_size() for part in self.parts.values())

    def select(self, index: Sequence[int]) -> None:
        """Makes ``lanes[i]`` a copy of the former ``lanes[index[i]]``; the pages are shared, not copied."""
        for lane in self.lanes:
            # Pages set aside but not yet written are not shared: two lanes would write into them.
            self.truncate(lane, lane.length)
        self.shares = True
        chosen = [self.lanes[i] for i in index]
        self._tables.clear()
        self.lanes = [Lane(list(lane.runs), lane.length) for lane in chosen]
        self.owners[:] = 0
        for pool in self._pools:
            for lane in pool.lanes:
                for first, count in lane.runs:
                    self.owners[first : first + count] += 1

    def _own(self, lane: Lane, first: int, count: int) -> None:
        self.owners[first : first + count] += 1
        self._tables.clear()
        lane.extend(first, count)

    def _take(self, lane: Lane, count: int) -> None:
        """Gives the lane ``count`` free pages: behind its last one, else in one run, else wherever they are."""
        if self._room_behind(lane, count):
            self._own(lane, sum(lane.runs[-1]) if lane.runs else self._first_free(count), count)
            return
        while count:
            piece = count if self._first_free(count) >= 0 else 1
            self._own(lane, self._first_free(piece), piece)
            count -= piece

    def _room_behind(self, lane: Lane, count: int) -> bool:
        if not lane.runs:
            return self._first_free(count) >= 0
        end = sum(lane.runs[-1])
        return end + count <= len(self.owners) and not self.owners[end : end + count].any()

    def _first_free(self, count: int) -> int:
        free = np.concatenate([[0], (self.owners == 0).astype(np.int8), [0]])
        edges = np.flatnonzero(np.diff(free))
        fitting = edges[0::2][edges[1::2] - edges[0::2] >= count]
        return int(fitting[0]) if len(fitting) else -1

    def _last_page(self, lane: Lane) -> int:
        return sum(lane.runs[-1]) - 1

    def _copy_last_page(self, lane: Lane, targets: list[int]) -> None:
        if self._first_free(1) < 0:
            self.arrange([1] * len(self.lanes))
        first, old = self._first_free(1), self._last_page(lane)
        for part in self.parts.values():
            part[first] = part[old]
        length = lane.length
        self.truncate(lane, length // self.page * self.page)
        self._own(lane, first, 1)
        lane.length = length


class UncompressedPool(PagePool):
    """Keys [pages, PAGE, d], values [pages, PAGE, dv] and positions [pages, PAGE] int32; more parts by ``add``."""

    def __init__(self, dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(
            {
                "keys": torch.empty(0, PAGE, dim, dtype=dtype, device=device),
                "values": torch.empty(0, PAGE, value_dim, dtype=dtype, device=device),
                "positions": torch.empty(0, PAGE, dtype=torch.int32, device=device),
            }
        )

    def add(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> None:
        """Makes room, not yet written, for a part [pages, *shape], of the keys' dtype unless another is given."""
        self.parts[name] = self.keys.new_empty(len(self.owners), *shape, dtype=dtype or self.keys.dtype)
        kernels.use_large_pages(self.parts[name])

    @property
    def keys(self) -> Tensor:
        return self.parts["keys"]

    @property
    def values(self) -> Tensor:
        return self.parts["values"]

    @property
    def positions(self) -> Tensor:
        return self.parts["positions"]
