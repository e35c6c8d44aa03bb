"""One row's choice of its next token."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. ``temperature`` 0: the likeliest. ``logprobs``: how many likeliest tokens are told beside
    the chosen one, None for nothing at all."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None


@dataclass(frozen=True)
class Chosen:
    """A token, its log-probability before sampling, and the likeliest tokens with theirs."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses for one row, whose earlier choices count for the penalties. Rows know nothing of each other."""

    def __init__(self, sampling: Sampling, row: int = 0) -> None:
        self.sampling = sampling
        self.counts: Counter[int] = Counter()
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed((sampling.seed + row) % 2**63)
        self.warpers = LogitsProcessorList()
        if sampling.temperature > 0:
            if sampling.temperature != 1:
                self.warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k:
                self.warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self.warpers.append(TopPLogitsWarper(sampling.top_p))

    def choose(self, logits: Tensor) -> Chosen:
        """The next token by ``logits`` [vocabulary]. Raises FloatingPointError where they are no numbers."""
        sampling = self.sampling
        scores = logits.float().cpu()
        if not torch.isfinite(scores).any() or torch.isnan(scores).any():
            raise FloatingPointError
        if self.counts and (sampling.frequency_penalty or sampling.presence_penalty):
            seen = torch.tensor(list(self.counts))
            times = torch.tensor(list(self.counts.values()), dtype=torch.float32)
            scores[seen] -= sampling.frequency_penalty * times + sampling.presence_penalty
        for token, bias in sampling.logit_bias.items():
            scores[token] += bias
        if sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            chances = self.warpers(torch.empty(1, 0, dtype=torch.long), scores[None]).softmax(-1)
            token = int(torch.multinomial(chances, 1, generator=self.generator))
        self.counts[token] += 1
        if sampling.logprobs is None:
            return Chosen(token)
        all_of_them = scores.log_softmax(-1)
        values, tokens = all_of_them.topk(sampling.logprobs)
        top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        return Chosen(token, float(all_of_them[token]), top)
