"""A layer fed with what a test knows, and the record of what it read."""

from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
from torch import Tensor

from kvote.hf.facts import find_rope
from kvote.layer import Layer, Step
from kvote.spec import parse
from kvote.store.segment import Scaling

SMALL = {"top_k": 6, "sinks": 2, "window": 4, "chunk": 8, "tail": 0, "theta": 2.0}
DIM = 16


def spec(**changes: Any) -> str:
    return f"tokenselect({', '.join(f'{k}={v!r}' for k, v in {**SMALL, **changes}.items())})"


@dataclass
class Trace:
    """What one layer read and how its heads voted, in order."""

    lists: list[Any] = field(default_factory=list)
    votes: list[Tensor] = field(default_factory=list)
    tables: list[int] = field(default_factory=list)

    def clear(self) -> None:
        for each in (self.lists, self.votes, self.tables):
            each.clear()

    @property
    def selected(self) -> list[Tensor]:
        return [index for index in self.lists if isinstance(index, Tensor)]


class Fed:
    """A layer fed with keys and queries whose un-rotated form the test knows."""

    def __init__(self, method: str, heads: int = 4, kv_heads: int = 2, rows: int = 1, n: int = 64) -> None:
        self.rope = find_rope(tiny.model(), 0)
        self.layer = Layer(0, parse(method), self.rope)
        self.query, self.key = torch.randn(rows, heads, n, DIM), torch.randn(rows, kv_heads, n, DIM)
        self.value, self.at = torch.randn(rows, kv_heads, n, DIM), 0
        self.places = torch.arange(n)

    def rotated(self, x: Tensor, start: int, stop: int) -> Tensor:
        cos, sin = self.rope.angles(self.places[None, start:stop], torch.float32)
        return self.rope.apply(x[:, :, start:stop], (cos[:, None], sin[:, None]))

    def feed(self, count: int, tail_queries: int = 0, prompt_left: int | None = 0) -> Tensor:
        a, b = self.at, self.at + count
        self.at = b
        places = self.places[None, a:b].expand(len(self.query), -1)
        parts = (self.rotated(self.query, a, b), self.rotated(self.key, a, b), self.value[:, :, a:b], places)
        tail_queries, decode = 1 if count == 1 else tail_queries, count == 1
        prompt_left = None if decode else prompt_left
        logits = Scaling(DIM**-0.5)
        return self.layer.attend(
            Step(*parts, valid=None, tail_queries=tail_queries, scaling=logits, decode=decode, prompt_left=prompt_left)
        )

    def dense(self, count: int) -> Tensor:
        """The last ``count`` rows of dense attention over all that was fed."""
        groups = self.query.shape[1] // self.key.shape[1]
        query, key = self.rotated(self.query, 0, self.at), self.rotated(self.key, 0, self.at)
        key, value = (x.repeat_interleave(groups, 1) for x in (key, self.value[:, :, : self.at]))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2)[:, -count:]

    def attended(self, seen: Tensor, slot: int, at: int) -> Tensor:
        """What query ``slot`` answers, standing at ``at``, over the tokens ``seen`` at positions from 0 on."""
        angles = self.rope.angles(torch.arange(at + 1)[None], torch.float32)
        cos, sin = angles[0][0], angles[1][0]
        key = self.rope.apply(self.key[:, :, seen], (cos[: len(seen)], sin[: len(seen)]))
        query = self.rope.apply(self.query[:, :, slot : slot + 1], (cos[at:], sin[at:]))
        groups = self.query.shape[1] // self.key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, self.value[:, :, seen]))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)[:, :, 0]

    def votes(self, a: int, b: int, edge: int, head_map: str = "gqa", row: int = 0) -> Tensor:
        """The card's formula, head by head, for queries a .. b - 1 that share a selection."""
        method = self.layer.method.read
        heads, kv_heads = self.query.shape[1], self.key.shape[1]
        cos, sin = self.rope.angles(torch.arange(method.window, method.window + b - a)[None], torch.float32)
        total = torch.zeros(edge - method.sinks)
        for head in range(heads):
            mean = self.rope.apply(self.query[row, head, a:b], (cos[0], sin[0])).mean(0)
            pair = head // (heads // kv_heads) if head_map == "gqa" else head % kv_heads
            total += torch.softmax(self.key[row, pair, method.sinks : edge] @ mean, dim=0)
        return total


def winners(votes: Tensor, k: int = 6, sinks: int = 2) -> list[int]:
    return sorted((votes.topk(k).indices + sinks).tolist())
