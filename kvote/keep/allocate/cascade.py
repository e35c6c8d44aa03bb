"""Layers divide a budget by preferences; the shares change while a prompt goes through the layers."""

from dataclasses import dataclass

from kvote.keep.allocate.shares import even, of_logs, shares
from kvote.keep.keeper import Held
from kvote.keep.score.votes import Votes
from kvote.store.pages import PAGE


@dataclass(frozen=True)
class Cascade:
    """For a score that casts a ``Vote`` per layer. What a prompt settled holds for the tokens generated after it."""

    cascades: bool = True
    per_layer: bool = True

    def margin(self, layers: int) -> int:
        # Layers that differ in length need up to a page more each.
        return PAGE

    def tokens(self, held: Held, memory: Votes, mean: int) -> int | None:
        if memory.worth(held.row) is None:
            return memory.limits.get(held.row)
        row, total = held.row, mean * held.layers
        votes = [seen.cast[row] for seen in held.memories[: held.observed]]
        given = shares(of_logs([vote.preference for vote in votes]), total, [vote.columns for vote in votes])
        share = given[held.layer]
        if held.observed == held.layers:
            # What a short prompt leaves of the budget is for what is generated.
            memory.limits[row] = share + even(total - sum(given), held.layers)[held.layer]
        return share
