"""The record of what a layer reads and how its heads vote."""

from typing import Any

import pytest
import torch
from selecting import Trace

from kvote import kernels
from kvote.index.sketch import Sketch
from kvote.rope import Rope
from kvote.store.uncompressed import UncompressedSegment


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    seen, attend = Trace(), UncompressedSegment.attend
    top_k, contiguous = kernels.top_k, Rope.contiguous

    def spy_attend(self: Any, queries: Any, rows: Any, tokens: Any, scaling: Any) -> Any:
        seen.lists.append(tokens.index)
        return attend(self, queries, rows, tokens, scaling)

    def spied(winners: Any) -> Any:
        def spy(
            self: Any, query: Any, rows: Any, start: int, limits: list[int], k: int, nominate: int = 0, skip: Any = None
        ) -> Any:
            # The fused selection is that of votes and top-k one after the other, where the votes can be seen.
            more = ({"nominate": nominate} if nominate else {}) | ({} if skip is None else {"skip": skip})
            fused = winners(self, query, rows, start, limits, k, **more)
            votes = kernels.forbid(self.votes(query, rows, start, limits), start, limits)
            chosen = kernels.top_k(votes, k) + start
            assert nominate or skip is not None or torch.equal(fused, chosen)
            return fused

        return spy

    # What happens in one call cannot be watched; tests/test_step.py holds it to what happens in several.
    monkeypatch.setattr(UncompressedSegment, "step", lambda *_: None)
    monkeypatch.setattr(UncompressedSegment, "attend", spy_attend)
    for voted in (UncompressedSegment, Sketch):
        monkeypatch.setattr(voted, "winners", spied(voted.winners))
    monkeypatch.setattr(kernels, "top_k", lambda votes, k: (seen.votes.append(votes.clone()), top_k(votes, k))[1])
    monkeypatch.setattr(
        Rope, "contiguous", lambda s, n, *rest, **at: (seen.tables.append(n), contiguous(s, n, *rest, **at))[1]
    )
    return seen
