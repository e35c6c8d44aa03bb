"""The record of what a layer reads and how its heads vote."""

from typing import Any

import pytest
from selecting import Trace

from kvote import kernels
from kvote.rope import Rope
from kvote.store.raw import RawSegment


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    seen, attend, top_k, contiguous = Trace(), RawSegment.attend, kernels.top_k, Rope.contiguous

    def spy_attend(self: Any, queries: Any, rows: Any, tokens: Any, logits: Any) -> Any:
        seen.lists.append(tokens.index)
        return attend(self, queries, rows, tokens, logits)

    monkeypatch.setattr(RawSegment, "attend", spy_attend)
    monkeypatch.setattr(kernels, "top_k", lambda votes, k: (seen.votes.append(votes.clone()), top_k(votes, k))[1])
    monkeypatch.setattr(Rope, "contiguous", lambda s, n, device: (seen.tables.append(n), contiguous(s, n, device))[1])
    return seen
