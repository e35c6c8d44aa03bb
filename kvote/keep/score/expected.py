"""Attention that future queries are expected to pay, if they are distributed like those of the prompt."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvote.errors import MethodError
from kvote.keep.keeper import Held
from kvote.keep.observation import Observation
from kvote.keep.rotated_keys import rotated_keys
from kvote.keep.score.gaussians import Gaussian, Gaussians
from kvote.keep.score.score import Score
from kvote.needs import Needs
from kvote.numbers import check_flags, check_whole, is_number

# Tokens whose keys are looked at together.
_TOKENS_HELD = 1024


@dataclass(frozen=True, kw_only=True)
class ExpectedQueries(Score):
    """Expected attention times the norm of the value. Queries of the first ``sinks`` tokens do not count, nor do these
    tokens; ``future``: over how many positions to come rotations are averaged; ``covariance`` and ``values``: whether
    either counts; ``epsilon`` is added to what is expected."""

    sinks: int
    future: int
    covariance: bool
    values: bool
    epsilon: float
    needs = Needs(rotation=True)
    uneven = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, future=1)
        check_flags(self, "covariance", "values")
        if not is_number(self.epsilon) or self.epsilon < 0:
            raise MethodError(f"epsilon must be a finite number of at least 0; got {self.epsilon!r}.")

    def new_memory(self) -> Gaussians:
        return Gaussians()

    def observes(self, prompt_left: int | None) -> bool:
        return prompt_left is not None

    def observe(self, seen: Observation, memory: Gaussians) -> None:
        # Behind the prompt's end, and before the tokens whose queries count.
        stop = seen.count + min(0, seen.prompt_left or 0)
        start = min(stop, max(0, self.sinks - seen.first))
        for i, row in enumerate(seen.rows):
            if start < stop:
                queries = _without_rotation(seen, i, row, start, stop)
                memory.add(row, Gaussian.of(queries, seen.first + seen.count, seen.scaling.scale))

    def ended(self, held: Held, memory: Gaussians) -> bool:
        return held.row in memory.rows

    def of(self, held: Held, memory: Gaussians, edge: int) -> Tensor:
        assert held.rotation is not None
        queries, heads = memory.rows[held.row][-1], held.segment.heads
        after = 1 + max(int(lane[-1]) for lane in held.segment.positions(held.row))
        mean, covariance = queries.future_moments(held.rotation, after, self.future)
        mean, covariance = (part.reshape(heads, -1, *part.shape[1:]) for part in (mean, covariance))
        spread = covariance if self.covariance else None
        expected = []
        for start in range(0, held.length, _TOKENS_HELD):
            stop = min(held.length, start + _TOKENS_HELD)
            rope = held.rotation if held.rope is None else None
            key = rotated_keys(held.segment, held.row, start, stop, rope)
            expected.append(log_expected(key, mean, spread, queries.scale))
        logits = torch.cat(expected, dim=2)
        # A head that holds fewer has nothing in front.
        begins = [held.length - lane + self.sinks for lane in held.lanes or [held.length] * heads]
        at = torch.arange(held.length, device=logits.device)
        early = at < torch.tensor(begins, device=logits.device)[:, None]
        logits = logits.masked_fill(early[:, None], float("-inf"))
        worth = logits.softmax(dim=2).mean(dim=1) + self.epsilon
        return worth * held.each(lambda key, value: value.norm(dim=-1), held.length) if self.values else worth

    def settled(self, held: Held, memory: Gaussians, over: bool) -> None:
        memory.rows.pop(held.row, None)


def log_expected(key: Tensor, mean: Tensor, covariance: Tensor | None, scale: float) -> Tensor:
    """The logarithm [h, g, n] of the mean of exp(scale q.k) over normally distributed q, of keys [h, n, d] as they are
    and the g query heads of each, with ``mean`` [h, g, d] and ``covariance`` [h, g, d, d]; None: of the mean alone."""
    key = key[:, None]
    logits = scale * (key @ mean[..., None])[..., 0]
    if covariance is None:
        return logits
    return logits + 0.5 * scale**2 * ((key @ covariance) * key).sum(dim=-1)


def _without_rotation(seen: Observation, i: int, row: int, start: int, stop: int) -> Tensor:
    """Queries [heads, n, d] of rows ``start`` to ``stop`` of a pass, of its i-th sequence, in float32."""
    if seen.queries.unrotated is not None:
        return seen.queries.unrotated[i, :, start:stop].float()
    assert seen.rope is not None
    # Slots are places that are aligned at the heads' ends.
    lane = seen.segment.positions(row)[0]
    begin = seen.first - (seen.segment.length(row) - len(lane))
    places = lane[begin + start : begin + stop].long()
    return seen.rope.apply(seen.queries.rotated[i, :, start:stop].float(), seen.rope.back(seen.rope.once(places)))
