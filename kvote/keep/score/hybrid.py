"""Attention received, entropy of a token's own attention, and how much a token would change what was just answered."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kvote.errors import MethodError
from kvote.keep.keeper import Held
from kvote.keep.observation import Observation
from kvote.keep.score.hybrid_memory import HybridMemory
from kvote.keep.score.score import Score
from kvote.numbers import is_number
from kvote.store.segment import Segment

# Float32 weights (16 MiB) that are held at a time.
_WEIGHTS_HELD = 1 << 22
# Tokens whose values are decoded at a time.
_TOKENS_HELD = 4096
_TINY = 1e-9


@dataclass(frozen=True, kw_only=True)
class Hybrid(Score):
    """A sum of three parts with weights that add up to 1, each stretched to 0 to 1 over the tokens held: attention
    received, entropy of the attention paid, and the L1 norms of what key and value would change in the squared
    distance of the latest answer from the one before. Where there was none before, the others count for it."""

    attention: float
    entropy: float
    gradient: float
    per_head: bool = False
    adds_up = True
    token_bytes = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = [self.attention, self.entropy, self.gradient]
        if not all(is_number(part) and part >= 0 for part in parts) or abs(sum(parts) - 1) > 1e-6:
            raise MethodError(
                f"attention, entropy and gradient must be shares from 0 to 1 that add up to 1; got {parts}."
            )

    def new_memory(self) -> HybridMemory:
        return HybridMemory()

    def observes(self, prompt_left: int | None) -> bool:
        return True

    def observe(self, seen: Observation, memory: HybridMemory) -> None:
        b, heads, t = seen.lse.shape
        n = seen.first + t
        signs = torch.zeros(b, 2, n, device=seen.lse.device)
        step = max(1, _WEIGHTS_HELD // (b * heads * n))
        for a in range(0, t, step):
            weights = seen.weights(a, min(t, a + step))
            signs[:, 0] += weights.sum(dim=(1, 2))
            entropy = -(weights * torch.log(weights + _TINY)).sum(dim=-1)
            signs[:, 1, seen.first + a : seen.first + a + weights.shape[2]] = entropy.mean(dim=1)
        last = seen.weights(max(0, t - 2), t)
        for i, row in enumerate(seen.rows):
            memory.add(row, signs[i])
            if self.gradient:
                self._learn(seen, i, last[i], memory)

    def _learn(self, seen: Observation, i: int, weights: Tensor, memory: HybridMemory) -> None:
        """Notes answer and gradients of the last query of a pass, of ``weights`` [heads, 1 or 2, n] of the last two."""
        row, scale, softcap = seen.rows[i], seen.scaling.scale, seen.scaling.softcap
        heads, count, n = weights.shape
        parts = [
            weights[..., a:z].reshape(len(value), -1, z - a) @ value for a, z, value in _values(seen.segment, row, n)
        ]
        answers = torch.stack(parts).sum(dim=0).reshape(heads, count, -1)
        before = memory.answers.get(row) if count == 1 else answers[:, 0]
        memory.answers[row] = answers[:, -1].clone()
        memory.gradients.pop(row, None)
        if before is None:
            return
        paid, query = weights[:, -1], seen.queries.rotated[i, :, -1].float()
        slope = torch.full_like(paid, scale)
        if softcap is not None:
            logits = paid.log() + seen.lse[i, :, -1:].float()
            slope *= (1 - (logits / softcap).square()).clamp_min(0)
        memory.gradients[row] = torch.cat(
            [
                gradient_norms(paid[:, a:z], value, query, answers[:, -1], before, slope[:, a:z])
                for a, z, value in _values(seen.segment, row, n)
            ]
        )

    def of(self, held: Held, memory: HybridMemory, edge: int) -> Tensor:
        received, entropy = memory.rows[held.row]
        parts = [(self.attention, received), (self.entropy, entropy)]
        if held.row in memory.gradients:
            parts.append((self.gradient, memory.gradients[held.row]))
        total = sum(weight for weight, _ in parts)
        if not total:
            # Nothing but gradients counts, and there are none yet.
            return received[None]
        return stretched(sum((weight / total * stretched(part) for weight, part in parts), torch.zeros(())))[None]


def _values(segment: Segment, row: int, n: int) -> Iterator[tuple[int, int, Tensor]]:
    """Values [h, m, dv] of the first ``n`` tokens in float32, some at a time, and where they begin and end."""
    for a in range(0, n, _TOKENS_HELD):
        z = min(n, a + _TOKENS_HELD)
        yield a, z, segment.decode([row], a, z)[1][0].float()


def stretched(x: Tensor) -> Tensor:
    """From 0 to 1; zeros where all are the same."""
    least, most = x.aminmax()
    return (x - least) / (most - least) if most > least else torch.zeros_like(x)


def gradient_norms(paid: Tensor, value: Tensor, query: Tensor, answer: Tensor, before: Tensor, slope: Tensor) -> Tensor:
    """L1 norms [n], added up over key heads and over key and value, of the gradient of mean((answer - before)²).

    ``paid`` [heads, n]: weights of the ``query`` [heads, d]; ``value`` [h, n, dv]; ``answer`` and ``before``
    [heads, dv]; ``slope`` [heads, n]: what a logit gains per unit of query times key.
    """
    h = len(value)
    pull = 2 * (answer - before) / answer.numel()
    paid, slope, query, answer, pull = (x.reshape(h, -1, x.shape[1]) for x in (paid, slope, query, answer, pull))
    of_values = torch.einsum("hgn,hgd->hnd", paid, pull)
    lift = pull @ value.transpose(1, 2) - (answer * pull).sum(dim=-1, keepdim=True)
    of_keys = torch.einsum("hgn,hgd->hnd", paid * lift * slope, query)
    return of_values.abs().sum(dim=(0, 2)) + of_keys.abs().sum(dim=(0, 2))
