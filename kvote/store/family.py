"""Family: page pools of several caches that share pages."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvote.store.pages import PagePool

# In the memo of a deep copy: pools are to share their pages with the copy.
FORK = "kvote.fork"
# Families whose pages are counted already, while several caches are counted together.
counted: ContextVar[set[int] | None] = ContextVar("counted", default=None)


@contextmanager
def counted_once() -> Iterator[None]:
    """Within, pages that several caches share are counted with the first of them."""
    token = counted.set(set())
    try:
        yield
    finally:
        counted.reset(token)


class Family:
    """The pools of caches that were forked from one: they share pages, the count of their owners, and the tensors. It
    keeps none alive; one that goes, wherever that happens, only is no longer there when owners are counted again."""

    def __init__(self) -> None:
        self._pools: list[weakref.ref[PagePool]] = []

    @property
    def pools(self) -> "list[PagePool]":
        return [pool for each in self._pools if (pool := each()) is not None]

    @property
    def lost_some(self) -> bool:
        return any(each() is None for each in self._pools)

    def add(self, pool: "PagePool") -> None:
        self._pools.append(weakref.ref(pool))

    def recount(self) -> None:
        """Counts the owners of every page among the pools that are left."""
        pools = self.pools
        self._pools = [weakref.ref(pool) for pool in pools]
        owners = pools[0].owners
        owners[:] = 0
        for pool in pools:
            for lane in pool.lanes:
                for first, count in lane.runs:
                    owners[first : first + count] += 1
