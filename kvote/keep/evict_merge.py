"""Drops what little attention ever fell on, then merges some of the rest into the tokens it resembles."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvote import kernels
from kvote.errors import MethodError
from kvote.keep.budget import Budget
from kvote.keep.keeper import Held, Kept
from kvote.keep.mass import Mass
from kvote.keep.merging import Tokens, assign, merged
from kvote.keep.observation import Observation
from kvote.keep.policies import Plain
from kvote.numbers import check_flags, check_whole, is_number
from kvote.rope import Rope


@dataclass
class Importance:
    """By sequence: attention received from all queries, or what a merged token's class is worth (``everywhere``), and
    from the last ones (``lately``); ``due``: sequences whose prompt has just ended."""

    everywhere: Mass = field(default_factory=Mass)
    lately: Mass = field(default_factory=Mass)
    due: set[int] = field(default_factory=set)

    def score(self, row: int) -> Tensor:
        """The larger of both [h, n], once they have the same mean in each head."""
        everywhere, lately = self.everywhere.rows[row], self.lately.rows.get(row)
        if lately is None:
            return everywhere
        # A head that nothing looked at gives nothing.
        scale = lately.mean(dim=-1, keepdim=True) / everywhere.mean(dim=-1, keepdim=True).clamp_min(1e-20)
        return torch.maximum(everywhere * scale, lately)

    def select(self, index: list[int]) -> None:
        self.everywhere.select(index)
        self.lately.select(index)
        self.due = {i for i, old in enumerate(index) if old in self.due}

    def keep(self, row: int, slots: Tensor) -> None:
        # What is merged has a worth that only the keeper knows; it has written it down.
        pass

    def truncate(self, row: int, length: int) -> None:
        self.everywhere.truncate(row, length)
        self.lately.truncate(row, length)

    @property
    def nbytes(self) -> int:
        return self.everywhere.nbytes + self.lately.nbytes


@dataclass(frozen=True)
class KeepMerged(Plain):
    """Parameters as in ``methods/ems.py``, which documents them."""

    budget: Budget
    window: int
    sinks: int
    merge: float
    threshold: float
    remove_positions: bool
    per_head: bool = True
    evict_generated: bool = True
    drops: bool = field(default=True, init=False)
    waits: bool = field(default=True, init=False)
    adds_up: bool = field(default=True, init=False)
    while_generating: bool = field(default=True, init=False)
    needs_rope: bool = field(default=True, init=False)
    token_bytes: int = field(default=8, init=False)

    def __post_init__(self) -> None:
        check_whole(self, window=1, sinks=0)
        if not is_number(self.merge) or self.merge < 0:
            raise MethodError(f"merge must be a finite number of at least 0; got {self.merge!r}.")
        if not is_number(self.threshold) or self.threshold <= 0:
            raise MethodError(f"threshold must be a finite number above 0; got {self.threshold!r}.")
        check_flags(self, "remove_positions", "per_head", "evict_generated")
        if self.budget.unit == "tokens" and self.budget.amount <= self.sinks + self.window:
            raise MethodError(
                f"budget must exceed sinks + window = {self.sinks + self.window}, which always stay; got "
                f"{self.budget.amount}."
            )
        object.__setattr__(self, "while_generating", self.evict_generated)
        object.__setattr__(self, "needs_rope", self.remove_positions)
        # Attention from all queries, and, where more are coming, from the last ones.
        object.__setattr__(self, "token_bytes", 8 if self.evict_generated else 4)

    def new_memory(self) -> Importance:
        return Importance()

    def observes(self, ahead: int | None) -> bool:
        return ahead is not None or self.evict_generated

    def observe(self, seen: Observation, memory: Importance) -> None:
        end = seen.count if seen.ahead is None else seen.count + seen.ahead
        # Queries behind a prompt's end are those of generated tokens.
        stop = seen.count if self.evict_generated else max(0, min(seen.count, end))
        # Generated queries are all recent ones: tokens are merged again before they are more than a window.
        start = 0 if seen.ahead is None else max(0, min(seen.count, end - self.window))
        early = self._shared(seen.mass(0, start)) if start else None
        late = self._shared(seen.mass(start, stop))
        for i, row in enumerate(seen.rows):
            memory.everywhere.add(row, late[i] if early is None else early[i] + late[i])
            if seen.ahead is not None and end - self.window >= 0:
                # The window begins in this pass, or in a later one.
                memory.lately.rows.pop(row, None)
            if stop > start:
                memory.lately.add(row, late[i])
            if seen.ahead is not None and seen.ahead <= 0:
                memory.due.add(row)

    def _shared(self, mass: Tensor) -> Tensor:
        return mass if self.per_head else mass.sum(dim=1, keepdim=True)

    def survivors(self, held: Held, memory: Importance) -> Kept | None:
        row, due = held.row, held.row in memory.due
        memory.due.discard(row)
        stays = max(held.budget, self.sinks + self.window)
        if held.length <= stays:
            # When tokens are dropped next, these queries will not be among the last ones.
            memory.lately.rows.pop(row, None)
        most = stays if due else stays + self.window
        if held.length <= most or row not in memory.everywhere.rows or not (due or self.evict_generated):
            return None
        score = memory.score(row)
        memory.lately.rows.pop(row, None)
        kept, others = self._classes(score, stays, held.length)
        content, worth = self._merge(held, score, kept, others)
        memory.everywhere.rows[row] = worth if self.per_head else worth.mean(dim=0, keepdim=True)
        return Kept(kept if self.per_head else kept[0], content)

    def _classes(self, score: Tensor, stays: int, length: int) -> tuple[Tensor, Tensor]:
        """Slots that stay and slots to be merged into them, [h, m] each, ascending; the others are irrelevant."""
        edge = length - self.window
        body, important = score[:, self.sinks : edge], stays - self.sinks - self.window
        top = kernels.top_k(body, important) if important else body.new_empty(len(body), 0, dtype=torch.int64)
        more = min(int(self.merge * important), body.shape[1] - important)
        rest = body.scatter(1, top, float("-inf"))
        next_ = kernels.top_k(rest, more) if more else top[:, :0]
        first = torch.arange(self.sinks, device=score.device).expand(len(score), -1)
        last = torch.arange(edge, length, device=score.device).expand(len(score), -1)
        return torch.cat([first, top + self.sinks, last], dim=1), next_ + self.sinks

    def _merge(
        self, held: Held, score: Tensor, kept: Tensor, others: Tensor
    ) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
        """What the tokens kept hold from now on, None if nothing new, and their importance."""
        key, value = (x[0] for x in held.segment.decode([held.row], 0, held.length))
        score, kept, others = (x.expand(len(key), -1) for x in (score, kept, others))
        if not others.shape[1]:
            return None, score.gather(1, kept)
        turns = held.rope if self.remove_positions else None
        at = held.segment.positions(held.row) if turns is not None else [None] * len(key)
        # Head by head: in float32 and without their rotation, tokens take several times what they are held in.
        new = []
        for head in range(len(key)):
            part = slice(head, head + 1)
            tokens = Tokens(key[part], value[part], score[part])
            new.append(self._merged(tokens, kept[part], others[part], turns, at[head]))
        worth = torch.cat([tokens.score for tokens, _ in new])
        if not any(grown for _, grown in new):
            return None, worth
        return (torch.cat([tokens.key for tokens, _ in new]), torch.cat([tokens.value for tokens, _ in new])), worth

    def _merged(
        self, tokens: Tokens, kept: Tensor, others: Tensor, turns: Rope | None, at: Tensor | None
    ) -> tuple[Tokens, bool]:
        """What ``kept`` [1, m] of the tokens of a head become, and whether anything was merged into them; ``at`` [n]:
        the positions of all, where their rotation is to be removed."""

        def still(slots: Tensor) -> Tokens:
            """Tokens in float32, without their rotation where it is to be removed."""
            taken = tokens.take(slots).float()
            if turns is None or at is None:
                return taken
            return replace(taken, key=turns.apply(taken.key, turns.back(turns.once(at.long()[slots]))))

        centres, alike = still(kept), still(others)
        into = assign(centres, alike, self.threshold)
        old = tokens.take(kept)
        if not bool((into >= 0).any()):
            return replace(old, score=centres.score), False
        new = merged(centres, alike, into)
        key = new.key if turns is None or at is None else turns.apply(new.key, turns.once(at.long()[kept]))
        same = (new.key == centres.key).all(dim=-1, keepdim=True)
        # Turned back and forth, a key would come out a little different.
        key = old.key.where(same, key.to(old.key.dtype))
        return Tokens(key, new.value.to(old.value.dtype), new.score), True
