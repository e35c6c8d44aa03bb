"""Heads split over two ranks of torch.distributed select what one process selects."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import distributed

from kvote.hf.facts import find_rope
from kvote.layer import Layer, Step
from kvote.spec import parse
from kvote.store.segment import Scaling
from kvote.store.uncompressed import UncompressedSegment

HEADS, KV_HEADS, DIM, PROMPT, STEPS = 8, 4, 16, 70, 24
SPEC = "tokenselect(top_k=6, sinks=2, window=4, chunk=8, tail=3, theta=0.9, reuse_span=8, tensor_parallel={})".format


def lists_read(rank: int, ranks: int) -> dict[str, Any]:
    """The token lists that a layer with its share of the heads reads, prompt and decode steps."""
    torch.manual_seed(0)
    query, key = torch.randn(1, HEADS, PROMPT + STEPS, DIM), torch.randn(1, KV_HEADS, PROMPT + STEPS, DIM)
    for slot in range(PROMPT, PROMPT + STEPS):
        # A slow drift, and a jump every seventh step: some steps reuse, some select.
        drift = 0.12 if (slot - PROMPT) % 7 else 2.0
        query[:, :, slot] = query[:, :, slot - 1] + drift * torch.randn(1, HEADS, DIM)
    query, key = query.chunk(ranks, 1)[rank], key.chunk(ranks, 1)[rank]
    rope = find_rope(tiny.model(), 0)
    layer, seen, attend = Layer(0, parse(SPEC(ranks > 1)), rope), [], UncompressedSegment.attend
    UncompressedSegment.attend = lambda s, q, r, tokens, lo: (
        seen.append(list(tokens.index)),
        attend(s, q, r, tokens, lo),
    )[1]
    try:
        for a, b in [(0, PROMPT)] + [(i, i + 1) for i in range(PROMPT, PROMPT + STEPS)]:
            at = torch.arange(a, b)[None]
            cos, sin = (x[:, None] for x in rope.angles(at, torch.float32))
            q, k = (rope.apply(x[:, :, a:b], (cos, sin)) for x in (query, key))
            layer.attend(Step(q, k, k, at, None, 1 if b - a == 1 else 3, Scaling(0.25), decode=b - a == 1))
    finally:
        UncompressedSegment.attend = attend
    lists = [[x.tolist() if isinstance(x, torch.Tensor) else x for x in index] for index in seen]
    return {"lists": lists, "selections": layer.activity.selections, "reused": layer.activity.reused}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    torch.save(lists_read(rank, 2), f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch was built without torch.distributed")
def test_two_ranks_select_the_same_tokens_as_one_process(tmp_path: Path):
    torch.multiprocessing.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    one = lists_read(0, 1)
    assert one["reused"] > 3
    assert one["selections"] > 10
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}.pt") == one


def test_half_of_the_heads_alone_selects_something_else(monkeypatch):
    monkeypatch.setattr(distributed, "all_reduce", lambda tensor: None)
    assert lists_read(0, 2)["lists"] != lists_read(0, 1)["lists"]
