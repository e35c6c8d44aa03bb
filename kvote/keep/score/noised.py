"""Attention received from all queries so far, with Gumbel noise on the logits and a temperature that rises."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvote.errors import MethodError
from kvote.keep.keeper import Held
from kvote.keep.observation import Observation
from kvote.keep.score.mass import Mass
from kvote.keep.score.random_score import hashed
from kvote.keep.score.score import Score
from kvote.numbers import check_flags, check_whole, is_number

# Float32 weights (16 MiB) that are held at a time.
_WEIGHTS_HELD = 1 << 22
# An odd constant, so that keys of neighbouring positions are far apart.
_SPREAD = 0x9E3779B1


@dataclass
class NoisedMass(Mass):
    """``Mass``, and at which position the latest prompt of each sequence ended (``ends``)."""

    ends: dict[int, int] = field(default_factory=dict)

    def select(self, index: list[int]) -> None:
        super().select(index)
        self.ends = {i: self.ends[old] for i, old in enumerate(index) if old in self.ends}


@dataclass(frozen=True, kw_only=True)
class NoisedAttention(Score):
    """Added up are weights of softmax((logits + noise) / temperature), over what a query read. The temperature is
    ``tau`` for queries of a prompt, and rises with each token generated after it, to ``tau_end`` within ``steps``.

    Noise is a function of ``seed``, layer, query head, and the positions of query and key, so how a text is cut into
    passes changes nothing; ``noise=False``: none.
    """

    tau: float
    tau_end: float
    steps: int
    noise: bool
    seed: int
    adds_up = True
    token_bytes = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, steps=1, seed=0)
        check_flags(self, "noise")
        for name in ("tau", "tau_end"):
            value = getattr(self, name)
            if not is_number(value) or value < 1e-3:
                raise MethodError(f"{name} must be a finite number of at least 0.001; got {value!r}.")

    def new_memory(self) -> NoisedMass:
        return NoisedMass()

    def observes(self, prompt_left: int | None) -> bool:
        return True

    def observe(self, seen: Observation, memory: NoisedMass) -> None:
        stop = seen.first + seen.count
        places = [torch.stack(list(seen.segment.positions(row)))[:, :stop].to(seen.lse.device) for row in seen.rows]
        if seen.prompt_left is not None:
            for row, at in zip(seen.rows, places, strict=True):
                memory.ends[row] = int(at[0, -1]) + 1 + seen.prompt_left
        b, heads, _ = seen.lse.shape
        step = max(1, _WEIGHTS_HELD // (b * heads * stop))
        for a in range(0, seen.count, step):
            logits = seen.weights(a, min(seen.count, a + step)).log_()
            for row, at, part in zip(seen.rows, places, logits, strict=True):
                self._add(part, at, seen, row, a, memory)

    def _add(self, logits: Tensor, at: Tensor, seen: Observation, row: int, a: int, memory: NoisedMass) -> None:
        """Adds ``scaling`` [heads, t, n] of the queries of a sequence from row ``a`` of a pass on, less a constant
        each; its key heads hold tokens of the positions ``at`` [h, n]."""
        h, n = at.shape
        query = at[0, seen.first + a : seen.first + a + logits.shape[1]].long()
        if self.noise:
            logits = logits + gumbel(self.seed, seen.layer, query, at.long().repeat_interleave(len(logits) // h, dim=0))
        # What nobody read has no weight, whatever the noise.
        weights = (logits / self.temperature(query, memory.ends.get(row, 0))[:, None]).softmax(dim=-1).nan_to_num_(0)
        mass = weights.reshape(h, -1, n).sum(dim=1)
        memory.add(row, self.shared(mass[None])[0])

    def temperature(self, position: Tensor, end: int) -> Tensor:
        """The temperature of queries at these positions, where the prompt ended before position ``end``."""
        generated = (position - end + 1).clamp(0, self.steps)
        return self.tau + generated * ((self.tau_end - self.tau) / self.steps)

    def of(self, held: Held, memory: NoisedMass, edge: int) -> Tensor:
        return memory.rows[held.row]


def gumbel(seed: int, layer: int, query: Tensor, key: Tensor) -> Tensor:
    """Gumbel(0, 1) noise [heads, t, n] for queries at the positions ``query`` [t] and keys at ``key`` [heads, n]."""
    head = torch.arange(len(key), device=key.device)
    stream = hashed(hashed(hashed(torch.tensor(seed, device=key.device)) + layer) + head)
    stream = hashed(stream[:, None] + query)
    bits = hashed(stream[..., None] + (key * _SPREAD)[:, None]) >> 8
    uniform = (bits.float() + 0.5) / (1 << 24)
    return -torch.log(-torch.log(uniform))
