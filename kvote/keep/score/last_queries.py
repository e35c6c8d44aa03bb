"""Attention received from the last queries of a prompt, pooled over neighbours."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from kvote.errors import MethodError
from kvote.keep.keeper import Held
from kvote.keep.observation import Observation
from kvote.keep.score.mass import Mass
from kvote.keep.score.score import Score
from kvote.numbers import check_whole

_POOLS: dict[str, Callable[[Tensor, int, int, int], Tensor]] = {"avg": avg_pool1d, "max": max_pool1d}


@dataclass(frozen=True, kw_only=True)
class LastQueries(Score):
    """Votes of the last ``window`` queries, each query head's pooled over ``kernel`` neighbours (``pooling``: 'avg' or
    'max'). They serve once: tokens generated after the prompt have none until the next prompt votes anew."""

    window: int
    kernel: int
    pooling: str
    uneven = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, window=1, kernel=1)
        if self.kernel % 2 == 0:
            raise MethodError(f"kernel must be odd, so that a pooled vote stays at its token; got {self.kernel}.")
        if self.pooling not in _POOLS:
            raise MethodError(f"pooling must be 'avg' or 'max'; got {self.pooling!r}.")

    def new_memory(self) -> Mass:
        return Mass()

    def observes(self, prompt_left: int | None) -> bool:
        return prompt_left is not None and prompt_left < self.window

    def observe(self, seen: Observation, memory: Mass) -> None:
        if seen.prompt_left is None:
            return
        end = seen.count + seen.prompt_left
        start, stop = max(0, end - self.window), min(seen.count, end)
        if start >= stop:
            return
        for row, mass in zip(seen.rows, self._votes(seen, start, stop), strict=True):
            if end >= self.window:
                memory.rows.pop(row, None)
            memory.add(row, mass)

    def _votes(self, seen: Observation, start: int, stop: int) -> Tensor:
        """Votes [b, h, n], or [b, heads, n] where query heads must be pooled one by one, before they are added up."""
        if self.pooling == "avg":
            return self.shared(seen.mass(start, stop))
        return seen.mass_by_query_head(start, stop)

    def ended(self, held: Held, memory: Mass) -> bool:
        return held.row in memory.rows

    def of(self, held: Held, memory: Mass, edge: int) -> Tensor:
        pooled = _POOLS[self.pooling](memory.rows[held.row][:, :edge], self.kernel, 1, self.kernel // 2)
        if self.pooling == "avg":
            return pooled
        return pooled.reshape(held.segment.heads if self.per_head else 1, -1, pooled.shape[1]).sum(dim=1)

    def settled(self, held: Held, memory: Mass, over: bool) -> None:
        memory.rows.pop(held.row, None)
