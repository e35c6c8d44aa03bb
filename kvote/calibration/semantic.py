"""Which query heads look at the whole of what says an answer, and what a layer loses when little of a prompt is kept
(CompressKV, arXiv 2508.02401)."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from kvote.cache import Cache
from kvote.calibration.file import Calibration
from kvote.calibration.fingerprint import Fingerprint
from kvote.calibration.needles import Needle
from kvote.calibration.one_pass import OnePass
from kvote.calibration.spans import SEMANTIC, best_heads
from kvote.errors import InputError
from kvote.keep.observation import Observation
from kvote.keep.policies import KeeperDefaults
from kvote.method import Method
from kvote.needs import KeeperOffers

SAMPLES, HEADS = 100, 4
# As published: what is kept while errors are measured, the last of them the window that chooses.
_KEPT, _WINDOW, _KERNEL = 32, 8, 5


def measure_semantic(
    model: Any, needles: Iterator[Needle], samples: int = SAMPLES, progress: Callable[[int], None] = lambda count: None
) -> Calibration:
    """Span scores of every query head and error shares of every layer, from ``samples`` texts, each read twice; those
    count whose answer the model gives for more than half. Raises InputError if there are none."""
    used: list[Needle] = []
    spans: dict[int, Tensor] = {}
    tokens = 0
    for _ in range(samples):
        needle = next(needles)
        tokens += needle.ids.shape[1]
        found, right = _read(model, needle, Spans(needle))
        progress(1)
        if right > 0.5:
            used.append(needle)
            spans = {layer: spans.get(layer, torch.zeros(1)) + held.value for layer, held in found.items()}
    if not used:
        raise InputError(f"The model answers none of {samples} questions, so nobody can tell which heads find answers.")
    scores = {layer: tuple((held / len(used)).tolist()) for layer, held in spans.items()}
    errors = dict.fromkeys(scores, 0.0)
    for needle in used:
        found, _ = _read(model, needle, Errors(needle, {i: best_heads(each, HEADS) for i, each in scores.items()}))
        errors = {layer: errors[layer] + float(held.value) for layer, held in found.items()}
    total = sum(errors.values())
    if not all(math.isfinite(each) for held in scores.values() for each in held) or not math.isfinite(total):
        raise InputError("The model gave numbers that are not finite; load it in a wider precision.")
    layers = {
        str(layer): {
            "span": [round(each, 6) for each in scores[layer]],
            "error": round(errors[layer] / (total or 1), 6),
        }
        for layer in sorted(scores)
    }
    return Calibration(SEMANTIC, Fingerprint.of(model), {"tokens": tokens, "layers": layers})


def _read(model: Any, needle: Needle, keeper: "Spans") -> "tuple[dict[int, Measured], float]":
    """What each layer has measured, and the share of the answer that the model gives."""
    cache, answer = Cache(model, Method("calibrate", keep=keeper)), needle.ids[0, needle.prompt :]
    with torch.inference_mode():
        ids = needle.ids.to(model.device)
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=len(answer) + 1).logits
    said = logits[0, :-1].argmax(-1).cpu()
    return {layer.index: layer.record.memory for layer in cache.managed}, float((said == answer).float().mean())


@dataclass
class Measured(OnePass):
    """What one layer has measured."""

    value: Tensor = field(default_factory=lambda: torch.zeros(1))

    @property
    def nbytes(self) -> int:
        return self.value.nbytes


@dataclass(frozen=True)
class Spans(KeeperDefaults):
    """Keeps everything, and measures how much of what says the answer each query head looks at while the answer
    copies a token from it."""

    needle: Needle
    budget = None
    # Only those that may drop tokens are shown what was read.
    offers = KeeperOffers(drops=True)

    def new_memory(self) -> Measured:
        return Measured()

    def observes(self, prompt_left: int | None) -> bool:
        return True

    def observe(self, seen: Observation, memory: Measured) -> None:
        memory.value = span_scores(self._answering(seen), self.needle)

    def survivors(self, held: Any, memory: Measured) -> None:
        return None

    def _answering(self, seen: Observation) -> Tensor:
        """Attention [heads, answer, n] of the queries whose next tokens are the answer."""
        return seen.weights(self.needle.prompt - 1, seen.count - 1)[0].cpu()


def span_scores(weights: Tensor, needle: Needle) -> Tensor:
    """The score [heads] of each head, from its attention [heads, answer, n] while the answer is given: the sum over the
    whole span, as often as the token given is in it."""
    said, span = needle.ids[0, needle.prompt :], needle.ids[0, needle.span.start : needle.span.stop]
    times = (said[:, None] == span).sum(1)
    return (weights[..., needle.span.start : needle.span.stop].sum(-1) * times).sum(1)


@dataclass(frozen=True)
class Errors(Spans):
    """Measures how far answers of a layer are from its own where it keeps 32 tokens of the prompt, chosen by ``heads``;
    before they are projected."""

    heads: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def observe(self, seen: Observation, memory: Measured) -> None:
        prompt, n = self.needle.prompt, seen.count
        window = seen.weights(prompt - _WINDOW, prompt)[0, list(self.heads[seen.layer]), :, : prompt - _WINDOW].cpu()
        votes = avg_pool1d(window.sum(1), _KERNEL, 1, _KERNEL // 2).mean(0)
        keep = torch.ones(n, dtype=torch.bool)
        keep[: prompt - _WINDOW] = False
        keep[votes.topk(min(_KEPT - _WINDOW, len(votes))).indices] = True
        weights = self._answering(seen)
        value = seen.segment.decode(seen.rows, 0, n)[1][0].float().cpu()
        value = value.repeat_interleave(len(weights) // len(value), dim=0)
        whole, few = weights @ value, weights * keep
        less = (few / few.sum(-1, keepdim=True).clamp_min(1e-30)) @ value
        apart, size = ((each.square().sum((0, 2))).sqrt() for each in (less - whole, whole))
        memory.value = (apart / (size + 1e-5)).sum()
