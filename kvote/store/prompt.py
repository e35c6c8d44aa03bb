"""A prompt that is encoded once, when it has ended, with uncompressed pages behind it for all that comes later."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvote.extra_inputs import ExtraInputs
from kvote.memory import storage_bytes
from kvote.rope import Rope
from kvote.store.bodies import Bodies, Body
from kvote.store.sequence import RegionSegment
from kvote.tokens import Queries


@dataclass
class Waiting:
    """What is known of a prompt that is not encoded: its last ``queries`` [heads, t, d] each, whether the last pass of
    it has come (``ended``), and how many tokens came ``after`` it."""

    queries: list[Tensor] = field(default_factory=list)
    ended: bool = False
    after: int = 0

    def take(self, query: Tensor, prompt_left: int | None) -> None:
        """The next ``query`` [heads, t, d] of the sequence; ``prompt_left`` as in ``Segment.observe_queries``."""
        t = query.shape[1]
        if prompt_left is None:
            self.after += t
            return
        if self.after:
            # Another turn: what was generated before it is now part of the text that it ends.
            self.queries, self.after = [], 0
        own = t + min(prompt_left, 0)
        self.queries.append(query[:, :own])
        self.ended, self.after = prompt_left <= 0, t - own

    def only_last(self, window: int) -> bool:
        """Lets go of all queries but the last ``window``, and says whether there were others."""
        more = sum(query.shape[1] for query in self.queries) > window
        kept: list[Tensor] = []
        for query in reversed(self.queries):
            if window > 0:
                kept.insert(0, query[:, max(0, query.shape[1] - window) :])
                window -= query.shape[1]
        self.queries = [torch.cat(kept, dim=1)] if kept else []
        return more

    def cut(self, gone: int) -> None:
        """The last ``gone`` tokens of the sequence are taken back."""
        later = min(self.after, gone)
        self.after -= later
        gone -= later
        while gone and self.queries:
            last = self.queries.pop()
            if last.shape[1] > gone:
                self.queries.append(last[:, : last.shape[1] - gone])
            gone = max(0, gone - last.shape[1])

    def copy(self) -> "Waiting":
        return Waiting(list(self.queries), self.ended, self.after)


# (the prompt's last queries [heads, w, d], its keys [h, p, d], values and positions [h, p]) -> the encoded first tokens
Encode = Callable[[Tensor, Tensor, Tensor, Tensor], Body | None]


class PromptSegment(RegionSegment):
    """A layer's tokens: for each sequence a body, once its prompt has ended, and uncompressed pages behind it.

    With ``encode``, a prompt is encoded as soon as it ends, by its last ``window`` queries. Without, someone who sees
    more than this layer asks for ``prompt`` and does it with ``put``.
    """

    def __init__(
        self, heads: int, like: Tensor, value_dim: int, rope: Rope | None, encode: Encode | None = None, window: int = 0
    ) -> None:
        self.encode, self.window = encode, window
        self.prompts = Bodies(heads, like.device)
        self.waiting: list[Waiting] = []
        super().__init__(heads, like, value_dim, rope, [self.prompts])

    @property
    def bodies(self) -> list[Body | None]:
        return self.prompts.bodies

    @property
    def nbytes(self) -> int:
        return super().nbytes + storage_bytes([query for waiting in self.waiting for query in waiting.queries])

    def add_sequences(self, count: int) -> None:
        super().add_sequences(count)
        self.waiting += [Waiting() for _ in range(count)]

    def observe_queries(
        self, queries: Queries, rows: list[int], prompt_left: int | None, extra_bytes: ExtraInputs | None = None
    ) -> None:
        for i, row in enumerate(rows):
            if self.bodies[row] is None:
                self.waiting[row].take(queries.rotated[i], prompt_left)
                if not self.window:
                    self.waiting[row].queries.clear()

    def checkpoint(self) -> tuple[Any, list[Waiting]]:
        return super().checkpoint(), [waiting.copy() for waiting in self.waiting]

    def restore(self, checkpoint: tuple[Any, list[Waiting]]) -> bool:
        uncompressed, self.waiting = checkpoint
        return super().restore(uncompressed)

    def compress(self, prompt_left: int) -> bool:
        before, forgot = [self.encoded(row) for row in range(self.sequences)], False
        for row, waiting in enumerate(self.waiting):
            if self.bodies[row] is not None:
                continue
            forgot |= waiting.only_last(self.window)
            if self.encode is None or not waiting.queries or self.prompt(row, prompt_left) is None:
                continue
            waiting.ended = False
            queries = torch.cat(waiting.queries, dim=1)
            held = (
                *(part[0] for part in self.uncompressed.decode([row], 0, self.length(row))),
                torch.stack(self.positions(row)),
            )
            prompt = [part[:, : self.length(row) - waiting.after] for part in held]
            self.put(row, self.encode(queries, *prompt))
        return forgot or before != [self.encoded(row) for row in range(self.sequences)]

    def prompt(self, row: int, prompt_left: int) -> int | None:
        """Tokens up to the end of a prompt that is to be encoded now; None if there is no such prompt."""
        waiting = self.waiting[row]
        if prompt_left or self.bodies[row] is not None or not waiting.ended:
            return None
        return max(0, self.length(row) - waiting.after)

    def put(self, row: int, body: Body | None) -> None:
        """Makes ``body`` stand for the first tokens of a sequence; None: they stay as they are until a prompt ends."""
        self.waiting[row].ended = False
        if body is None:
            return
        self.bodies[row], self.waiting[row] = body, Waiting()
        self.uncompressed.keep(row, torch.arange(body.positions.shape[1], self.uncompressed.length(row)))

    def truncate(self, row: int, length: int) -> None:
        self.waiting[row].cut(self.length(row) - length)
        super().truncate(row, length)

    def select(self, index: list[int]) -> None:
        super().select(index)
        self.waiting = [self.waiting[i].copy() for i in index]
