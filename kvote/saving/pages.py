"""Pages as state: those that lanes own, in their order, numbered anew. Free pages and tables are no state, and page
numbers from a file are only believed once they have been checked."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvote.state import Block, Describer, Maker
from kvote.store.pages import Lane, PagePool

# Tokens of a lane, at most.
_MOST = 2**31 - 1


def describe_pool(pool: PagePool, describer: Describer, path: str) -> dict[str, Any]:
    """Lanes as [tokens, [[first page, pages], ...]], and each part of the pool with the pages in use."""
    fresh = np.full(len(pool.owners), -1, np.int64)
    order: list[int] = []
    lanes = []
    for lane in pool.lanes:
        # Pages set aside behind the last token are not in use.
        ids = lane.page_ids()[: -(-lane.length // pool.page)]
        new = ids[fresh[ids] < 0]
        fresh[new] = np.arange(len(order), len(order) + len(new))
        order += new.tolist()
        lanes.append([lane.length, _runs(fresh[ids])])
    pages, ends = torch.tensor(order, dtype=torch.int64, device=pool.device), _ends(pool, fresh)
    parts = {}
    for name, part in pool.parts.items():
        taken = partial(_taken, pool, name, pages, ends)
        block = Block((len(order), *part.shape[1:]), part.dtype, taken)
        parts[name] = describer.block(f"{path}.{name}", block)
    return {"lanes": lanes, "parts": parts}


def fill_pool(pool: PagePool, facts: dict[str, Any], maker: Maker) -> None:
    """Raises ValueError for lanes and pages that make no sense together."""
    if facts.keys() != {"lanes", "parts"} or facts["parts"].keys() != pool.parts.keys():
        raise ValueError("a pool of pages has other parts than this method's")
    parts = {name: maker.tensor(facts["parts"][name]) for name in pool.parts}
    pages = {len(part) for part in parts.values()}
    for name, part in pool.parts.items():
        if parts[name].shape[1:] != part.shape[1:] or parts[name].dtype != part.dtype or len(pages) != 1:
            raise ValueError(f"the {name} of a pool of pages are of another form than this method's")
    owners, lanes = np.zeros(pages.pop(), np.int32), []
    for lane in facts["lanes"]:
        match lane:
            case [int(length), list(runs)] if 0 <= length <= _MOST:
                lanes.append(_lane(length, runs, owners, pool.page))
            case _:
                raise ValueError("a lane is no list of pages")
    if not (owners > 0).all():
        raise ValueError("a page belongs to no lane")
    if "positions" in parts and parts["positions"].numel() and int(parts["positions"].min()) < 0:
        raise ValueError("a position is negative")
    pool.parts, pool.owners, pool.lanes = parts, owners, lanes
    pool.shares = bool((owners > 1).any())
    pool._tables.clear()


def check_lanes(pool: PagePool, heads: int) -> list[int]:
    """Tokens of each sequence. Raises ValueError where its ``heads`` lanes hold different numbers of tokens."""
    lengths = [lane.length for lane in pool.lanes]
    each = [lengths[i : i + heads] for i in range(0, len(lengths), heads)]
    if len(lengths) % heads or any(len(set(row)) != 1 for row in each):
        raise ValueError("the key heads of a sequence hold unequally many tokens")
    return [row[0] for row in each]


def _lane(length: int, runs: list[Any], owners: np.ndarray, page: int) -> Lane:
    lane, seen = Lane(length=length), 0
    for run in runs:
        match run:
            case [int(first), int(count)] if first >= 0 and 0 < count <= len(owners) - first:
                owners[first : first + count] += 1
                lane.runs.append((first, count))
                seen += count
            case _:
                raise ValueError("a lane names pages that are not there")
    if seen != -(-length // page) or len({int(i) for i in lane.page_ids()}) != seen:
        raise ValueError("a lane has more or fewer pages than its tokens need")
    # A lane without pages has no place yet: the pool gives it one when it grows.
    return lane


def _runs(ids: np.ndarray) -> list[list[int]]:
    lane = Lane()
    for i in ids.tolist():
        lane.extend(i, 1)
    return [list(run) for run in lane.runs]


def _ends(pool: PagePool, fresh: np.ndarray) -> list[tuple[int, int]]:
    """Pages, as numbered anew, that are not full, and the tokens in them; the most where lanes share one."""
    ends: dict[int, int] = {}
    for lane in pool.lanes:
        if used := lane.length % pool.page:
            at = int(fresh[lane.page_ids()[lane.length // pool.page]])
            ends[at] = max(used, ends.get(at, 0))
    return list(ends.items())


def _taken(pool: PagePool, name: str, pages: Tensor, ends: list[tuple[int, int]]) -> Tensor:
    """Some pages of a part; nothing is left of what stood behind the last token."""
    taken, erase = pool.parts[name][pages], pool.erasers.get(name)
    for at, used in ends:
        if erase is not None:
            erase(taken[at], used)
        elif taken.dim() > 1 and taken.shape[1] == pool.page:
            taken[at, used:] = 0
    return taken
