"""Attention received from all queries of a prompt; of generated tokens, the one at a fixed place goes."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote.keep.keeper import Held
from kvote.keep.observation import Observation
from kvote.keep.score.mass import Mass
from kvote.keep.score.score import Score
from kvote.numbers import check_whole


@dataclass
class PromptMass(Mass):
    """``rows``: of prompts that are not settled. By sequence: tokens that its layer may hold, where layers compete and
    have not been asked yet (``shares``); how many it kept of the latest prompt (``kept``), of a text of how many
    (``texts``)."""

    shares: dict[int, int] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)
    texts: dict[int, int] = field(default_factory=dict)

    def select(self, index: list[int]) -> None:
        super().select(index)
        for name in ("shares", "kept", "texts"):
            held = getattr(self, name)
            setattr(self, name, {i: held[old] for i, old in enumerate(index) if old in held})


@dataclass(frozen=True, kw_only=True)
class PromptAttention(Score):
    """The same tokens for all heads. Once a prompt was cut down, the place ``distance`` tokens before its end is where
    generated tokens make others go; the middle of what is held, where less is."""

    distance: int
    per_head: bool = False
    # Where generated tokens make others go depends on the prompt, whose queries cannot be taken back.
    adds_up = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, distance=1)

    def new_memory(self) -> PromptMass:
        return PromptMass()

    def observes(self, prompt_left: int | None) -> bool:
        return prompt_left is not None

    def observe(self, seen: Observation, memory: PromptMass) -> None:
        # Queries behind a prompt's end are those of generated tokens.
        stop = max(0, seen.count + min(0, seen.prompt_left or 0))
        if not stop:
            return
        for row, mass in zip(seen.rows, self.shared(seen.mass(0, stop)), strict=True):
            memory.add(row, mass)

    def ended(self, held: Held, memory: PromptMass) -> bool:
        return held.row in memory.rows

    def of(self, held: Held, memory: PromptMass, edge: int) -> Tensor:
        if held.row in memory.rows:
            return memory.rows[held.row]
        kept = memory.kept.get(held.row, held.length - 1)
        place = kept - self.distance if kept > self.distance else kept // 2
        # The token there, and if several go, those behind it; nothing before it as long as there are such.
        at = torch.arange(edge, device=held.segment.device)
        return torch.where(at < place, edge + place - at, at - place).float()[None]

    def settled(self, held: Held, memory: PromptMass, over: bool) -> None:
        # The layers after this one still change what it may hold.
        if held.observed == held.layers:
            memory.rows.pop(held.row, None)
