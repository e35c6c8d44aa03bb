"""Score: what each token held is worth. Everything else about eviction is ``keep.evict``'s."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvote.keep.keeper import Held
from kvote.keep.observation import Observation
from kvote.needs import NOTHING, Needs
from kvote.numbers import check_flags


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a token is worth; a score that looks at no attention defines ``of`` alone.

    ``per_head``: every key head keeps its own tokens; False: all keep the same, by the sum over heads. ``per_layer``:
    whether layers may differ; ``layers_alike``: those in a group of so many neighbours do not. ``adds_up``: whether
    what was observed cannot be taken back. ``token_bytes``: what is remembered for good, per token and key head.
    ``spare``: tokens that a budget must leave to it besides sinks and window. ``uneven``: whether it can judge key
    heads that hold different numbers of tokens, which are places aligned at their ends (``store.uneven``), with nothing
    in front of the shorter ones. ``needs``: as those of a ``Keeper``.
    """

    per_head: bool = True
    per_layer = True
    layers_alike = 1
    spare = 1
    uneven = False

    def __post_init__(self) -> None:
        check_flags(self, "per_head")

    @property
    def adds_up(self) -> bool:
        return False

    @property
    def needs(self) -> Needs:
        return NOTHING

    @property
    def token_bytes(self) -> int:
        return 0

    def new_memory(self) -> Any:
        """An empty memory (``keeper.Remembered``), or None."""
        return None

    def observes(self, prompt_left: int | None) -> bool:
        """Whether it wants to see a pass; ``prompt_left`` as in ``Observation``."""
        return False

    def observe(self, seen: Observation, memory: Any) -> None:
        """Is shown the passes that it asked for."""

    def due(self, memory: Any) -> bool:
        """Does what ``Keeper.due`` does."""
        return False

    def ended(self, held: Held, memory: Any) -> bool:
        """Whether a prompt of this sequence has just ended; otherwise its new tokens were generated."""
        return not held.generated

    def of(self, held: Held, memory: Any, edge: int) -> Tensor | None:
        """The worth of tokens, [h, n], or [1, n] for all key heads; None: nothing is known, and all stay.

        Tokens from ``edge`` on stay in any case, and so do those behind the n that are given.
        """
        raise NotImplementedError

    def settled(self, held: Held, memory: Any, over: bool) -> None:
        """It is decided what goes; ``over``: nothing does, although the sequence is above its budget."""

    def shared(self, mass: Tensor) -> Tensor:
        """``mass`` [b, h, n], or its sum over heads [b, 1, n] where all keep the same."""
        return mass if self.per_head else mass.sum(dim=1, keepdim=True)
