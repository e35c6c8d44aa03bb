"""Subtasks: stretches of a text that nobody needs once they have ended go, the oldest first."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote.errors import MethodError
from kvote.extra_inputs import IDS, MARKS
from kvote.keep.keeper import Held, Kept
from kvote.keep.observation import Observation
from kvote.keep.policies import KeeperDefaults
from kvote.memory import storage_bytes
from kvote.needs import KeeperOffers, Needs
from kvote.numbers import check_whole

# A token opens or closes a list of subtasks, or lies in one by a mark.
OPENS, CLOSES, INSIDE = 1, -1, 2


@dataclass
class Visible:
    """By sequence, of the tokens held: their ``ids`` int32 [n], and what they are to the tree (``parts`` int8 [n]).
    ``ended``: sequences in which a list has ended since they were last asked; ``stale``: the first slot of what was
    computed while tokens that were dropped since could be seen."""

    ids: dict[int, Tensor] = field(default_factory=dict)
    parts: dict[int, Tensor] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    stale: dict[int, int] = field(default_factory=dict)

    def add(self, row: int, ids: Tensor, parts: Tensor) -> None:
        """Adds new tokens of a sequence."""
        before = self.parts.get(row, parts[:0])
        inside = torch.cat([before[-1:], parts]) == INSIDE
        if bool((parts == CLOSES).any() | (inside[:-1] & ~inside[1:]).any()):
            self.ended.add(row)
        self.ids[row] = torch.cat([self.ids.get(row, ids[:0]), ids])
        self.parts[row] = torch.cat([before, parts])

    def select(self, index: list[int]) -> None:
        for name in ("ids", "parts", "stale"):
            held = getattr(self, name)
            setattr(self, name, {i: held[old] for i, old in enumerate(index) if old in held})
        self.ended = {i for i, old in enumerate(index) if old in self.ended}

    def keep(self, row: int, slots: Tensor) -> None:
        gone = int((slots == torch.arange(len(slots), device=slots.device)).long().cumprod(0).sum())
        self.stale[row] = min(gone, self.stale.get(row, gone))
        for held in (self.ids, self.parts):
            held[row] = held[row][slots.to(held[row].device)]

    def truncate(self, row: int, length: int) -> None:
        for held in (self.ids, self.parts):
            if row in held:
                held[row] = held[row][:length].clone()
        if self.stale.get(row, 0) >= length:
            self.stale.pop(row, None)

    @property
    def nbytes(self) -> int:
        return storage_bytes([*self.ids.values(), *self.parts.values()])


@dataclass(frozen=True)
class Subtasks(KeeperDefaults):
    """Parameters as in ``methods/tim.py``, which documents them."""

    opens: tuple[int, ...]
    closes: tuple[int, ...]
    threshold: int
    mark: str
    budget = None

    offers = KeeperOffers(waits=True, equal_layers=True)

    def __post_init__(self) -> None:
        check_whole(self, threshold=0)
        for name in ("opens", "closes"):
            value = getattr(self, name)
            if not isinstance(value, tuple | list) or not all(type(each) is int and each >= 0 for each in value):
                raise MethodError(f"{name} must be token ids, such as (91,); got {value!r}.")
        if bool(self.opens) != bool(self.closes) or set(self.opens) & set(self.closes):
            raise MethodError(
                "opens and closes name the tokens that begin and end a list of subtasks, some of each and none of "
                f"both; got {self.opens!r} and {self.closes!r}. Without any, lists are what cache.mark_span names."
            )
        if not isinstance(self.mark, str) or not self.mark:
            raise MethodError(f"mark must be the name of spans, such as 'subtasks'; got {self.mark!r}.")

    @property
    def needs(self) -> Needs:
        return Needs(extra_inputs=frozenset({IDS} if self.opens else {IDS, MARKS}))

    def new_memory(self) -> Visible:
        return Visible()

    def observes(self, prompt_left: int | None) -> bool:
        return True

    def observe(self, seen: Observation, memory: Visible) -> None:
        assert seen.extra_inputs is not None
        ids = seen.extra_inputs.ids
        assert ids is not None
        if self.opens:
            opens, closes = (torch.tensor(each, device=ids.device) for each in (self.opens, self.closes))
            parts = torch.isin(ids, opens) * OPENS + torch.isin(ids, closes) * CLOSES
        else:
            parts = seen.extra_inputs.marked(self.mark) * INSIDE
        for row, own, part in zip(seen.rows, ids.int(), parts.to(torch.int8), strict=True):
            memory.add(row, own, part)

    def survivors(self, held: Held, memory: Visible) -> Kept | None:
        if held.row not in memory.ended:
            return None
        memory.ended.discard(held.row)
        stay = torch.ones_like(memory.parts[held.row])
        for start, stop in outdated(memory.parts[held.row].tolist(), self.threshold):
            stay[start:stop] = 0
        slots = stay.nonzero()[:, 0]
        return Kept(slots) if len(slots) < held.length else None


def outdated(parts: Sequence[int], threshold: int) -> list[tuple[int, int]]:
    """The bodies ``start`` to ``stop`` of the lists that go, so that ``threshold`` of those that have ended, and still
    hold something, stay: the first to end goes first, and with it what lies in it."""
    lists = [(a, b) for a, b in ended(parts) if a < b]
    gone: list[tuple[int, int]] = []
    while len(lists) > threshold:
        gone.append(lists.pop(0))
        lists = [(a, b) for a, b in lists if sum(not any(x <= i < y for x, y in gone) for i in range(a, b))]
    return gone


def ended(parts: Sequence[int]) -> list[tuple[int, int]]:
    """The bodies of all lists that have ended, without what opens and closes them, in the order in which they did."""
    open_, lists, marked = [], [], None
    for i, part in enumerate(parts):
        if part == INSIDE:
            marked = i if marked is None else marked
            continue
        if marked is not None:
            lists.append((marked, i))
            marked = None
        if part == OPENS:
            open_.append(i + 1)
        elif part == CLOSES and open_:
            lists.append((open_.pop(), i))
    return lists
