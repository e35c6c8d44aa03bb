"""Mean and variance of the attention of a prompt's last queries; entropy and variance of a layer's attention."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvote.errors import MethodError
from kvote.keep.keeper import Held
from kvote.keep.observation import Observation
from kvote.keep.score.score import Score
from kvote.keep.score.votes import Moments, Vote, Votes
from kvote.numbers import check_whole, is_number

# Float32 weights (16 MiB) that are held at a time.
_WEIGHTS_HELD = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Dispersion(Score):
    """Mean plus ``gamma`` times variance of the attention that the last ``window`` queries pay, pooled over ``kernel``
    neighbours; a layer's preference is the entropy of that attention to the power of 1 / ``tau1`` times its variance
    to the power of 1 / ``tau2``. With ``generated``, a generated token judges by the attention that it pays itself."""

    window: int
    gamma: float
    kernel: int
    tau1: float
    tau2: float
    generated: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, window=1, kernel=1)
        if self.kernel % 2 == 0:
            raise MethodError(f"kernel must be odd, so that a pooled value stays at its token; got {self.kernel}.")
        for name, least in (("gamma", 0), ("tau1", 1e-3), ("tau2", 1e-3)):
            value = getattr(self, name)
            if not is_number(value) or value < least:
                raise MethodError(f"{name} must be a finite number of at least {least}; got {value!r}.")

    @property
    def adds_up(self) -> bool:
        return self.generated

    def new_memory(self) -> Votes:
        return Votes()

    def observes(self, prompt_left: int | None) -> bool:
        return self.generated if prompt_left is None else prompt_left < self.window

    def observe(self, seen: Observation, memory: Votes) -> None:
        if seen.prompt_left is None:
            free = seen.first + seen.count - self.window
            if any(memory.limits.get(row, free) < free for row in seen.rows):
                for row, mass in zip(seen.rows, self.shared(seen.mass(seen.count - 1)), strict=True):
                    memory.latest[row] = mass
            return
        end = seen.count + seen.prompt_left
        start, stop = max(0, end - self.window), min(seen.count, end)
        if start >= stop:
            return
        columns = max(0, seen.first + end - self.window)
        for row, part in zip(seen.rows, self._moments(seen, start, stop, columns), strict=True):
            before = memory.pending.pop(row, None)
            # Where the window begins in this pass, nothing before belongs to it; nor does what is left of a prompt
            # that ended elsewhere.
            if before is not None and end < self.window and before.mean.shape == part.mean.shape:
                part = before + part
            if seen.prompt_left > 0:
                memory.pending[row] = part
            else:
                memory.cast[row] = self._vote(part, columns, seen.segment.heads)

    def _moments(self, seen: Observation, start: int, stop: int, columns: int) -> list[Moments]:
        """The moments of each sequence over its first ``columns`` tokens."""
        b, heads, _ = seen.lse.shape
        rows = max(1, _WEIGHTS_HELD // (b * heads * (seen.first + seen.count)))
        total: list[Moments] = []
        for a in range(start, stop, rows):
            weights = seen.weights(a, min(stop, a + rows))[..., :columns]
            parts = [Moments.of(each) for each in weights]
            total = [one + other for one, other in zip(total, parts, strict=True)] if total else parts
        return total

    def _vote(self, moments: Moments, columns: int, kv_heads: int) -> Vote:
        preference = _log(moments.entropy) / self.tau1 + _log(float(moments.variance.sum())) / self.tau2
        worth = moments.mean + self.gamma * moments.variance
        worth = worth.reshape(kv_heads, -1, columns).mean(dim=1) if columns else worth[:kv_heads]
        worth = worth if self.per_head else worth.mean(dim=0, keepdim=True)
        return Vote(preference, columns, self._pooled(worth))

    def _pooled(self, x: Tensor) -> Tensor:
        return avg_pool1d(x, self.kernel, 1, self.kernel // 2) if x.shape[-1] else x

    def ended(self, held: Held, memory: Votes) -> bool:
        return memory.worth(held.row) is not None

    def of(self, held: Held, memory: Votes, edge: int) -> Tensor | None:
        latest, worth = memory.latest.get(held.row), memory.worth(held.row)
        return worth if worth is not None or latest is None else self._pooled(latest[:, :edge])

    def settled(self, held: Held, memory: Votes, over: bool) -> None:
        # The prompt is over, also for a sequence that had no token in its last pass.
        memory.pending.pop(held.row, None)
        memory.latest.pop(held.row, None)
        # The layers after this one may still change what it may hold.
        if held.observed == held.layers:
            memory.settle(held.row)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
