"""The most attention that any of a prompt's last queries gives a token, in the mean over heads."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote.errors import MethodError
from kvote.keep.keeper import Held
from kvote.keep.observation import Observation
from kvote.keep.score.mass import Mass
from kvote.keep.score.score import Score
from kvote.numbers import check_flags, check_whole, is_number

# Prompts of more tokens are judged by half the share of their queries.
_LONG = 24_000
# Float32 weights (16 MiB) that are held at a time.
_WEIGHTS_HELD = 1 << 22


@dataclass
class Most(Mass):
    """``rows``: by sequence, the most attention [1, n] since its prompt's last queries began, until all layers have
    settled what goes."""

    rows: dict[int, Tensor] = field(default_factory=dict)

    def meet(self, row: int, most: Tensor) -> None:
        """Takes the larger of what is known and ``most`` [n], for all tokens of the sequence."""
        held, most = self.rows.get(row), most[None].clone()
        if held is not None:
            most[:, : held.shape[1]] = torch.maximum(most[:, : held.shape[1]], held)
        self.rows[row] = most

    def keep(self, row: int, slots: Tensor) -> None:
        # Layers that take over what is settled here still read it as it was.
        pass


@dataclass(frozen=True, kw_only=True)
class AnyQuery(Score):
    """The last queries are the share ``queries`` of a prompt's tokens, half of that in long prompts. Layers keep the
    same in groups of ``layers_alike``: what its first layer sees. ``scaled``: weights as in the softmax; False: as they
    are with products that are not scaled, which are sharper."""

    queries: float
    scaled: bool
    layers_alike: int
    per_head: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(self, "scaled")
        check_whole(self, layers_alike=1)
        if not is_number(self.queries) or not 0 < self.queries <= 1:
            raise MethodError(f"queries must be a share of a prompt, above 0 and at most 1; got {self.queries!r}.")

    def new_memory(self) -> Most:
        return Most()

    def observes(self, prompt_left: int | None) -> bool:
        return prompt_left is not None

    def observe(self, seen: Observation, memory: Most) -> None:
        if seen.prompt_left is None:
            return
        end = seen.count + seen.prompt_left
        tokens = seen.first + end
        window = max(1, int(tokens * self.queries / (2 if tokens > _LONG else 1)))
        start, stop = max(0, end - window), min(seen.count, end)
        if start >= stop:
            return
        if end >= window:
            # The last queries begin in this pass.
            for row in seen.rows:
                memory.rows.pop(row, None)
        b, heads, _ = seen.lse.shape
        step = max(1, _WEIGHTS_HELD // (b * heads * tokens))
        for a in range(start, stop, step):
            weights = seen.weights(a, min(stop, a + step))
            if not self.scaled:
                weights = (weights.log() / seen.scaling.scale).softmax(-1)
            for row, most in zip(seen.rows, weights.mean(1).amax(1), strict=True):
                memory.meet(row, most)

    def ended(self, held: Held, memory: Most) -> bool:
        return held.row in memory.rows

    def of(self, held: Held, memory: Most, edge: int) -> Tensor:
        first: Most = held.memories[held.layer - held.layer % self.layers_alike] if held.memories else memory
        return first.rows[held.row]

    def settled(self, held: Held, memory: Most, over: bool) -> None:
        if held.layer == held.layers - 1:
            for each in held.memories:
                each.rows.pop(held.row, None)
        if not held.memories:
            memory.rows.pop(held.row, None)
