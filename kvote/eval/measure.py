"""One sample with one method: scores, likelihoods and costs, as one record for JSON."""

from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kvote.errors import InputError, KvoteError
from kvote.eval.read import Answered, Reading
from kvote.eval.sample import Sample
from kvote.eval.score import score
from kvote.eval.subject import Subject
from kvote.eval.tasks.book import SCORED
from kvote.eval.template import template_of


@dataclass
class Reference:
    """What dense attention gave for the sample at hand: log-probabilities [t, vocabulary] of a continuation."""

    logprobs: Tensor | None = None


def measure(
    subject: Subject, sample: Sample, method: str, reference: Reference, *, question_first: bool = False
) -> dict[str, Any]:
    """Scores ``sample`` with ``method``. Dense attention fills the ``reference``; others are compared with it.
    ``question_first``: document and question are one prompt; a text whose continuation is scored has no question.

    What kvote refuses becomes a record with ``refused``, the sentence it refused with.
    """
    try:
        if sample.continuation is not None:
            # A book is no message of a user's.
            subject = replace(subject, template=template_of(subject.tokenizer, plain=True))
        lazy = question_first and sample.continuation is None
        reading = Reading(subject, method, sample.document, question_first=lazy)
        if sample.continuation is not None:
            return _likelihood(subject, sample.continuation, reading, reference, dense=method == "dense")
        return _answers(subject, sample, reading)
    except (KvoteError, NotImplementedError) as error:
        return {"refused": str(error)}


def _answers(subject: Subject, sample: Sample, reading: Reading) -> dict[str, Any]:
    got: list[Answered] = []
    for i, question in enumerate(sample.questions):
        got.append(reading.turn(question, opening=i == 0) if sample.turns else reading.ask(question))
    said = [subject.tokenizer.decode(one.tokens, skip_special_tokens=True).strip() for one in got]
    scores = [score(answer, question) for answer, question in zip(said, sample.questions, strict=True)]
    return {
        "score": sum(scores) / len(scores),
        "scores": scores,
        "answers": said,
        "expected": [list(question.answers) for question in sample.questions],
        "questions": [question.text for question in sample.questions],
        "answer_ids": [one.tokens for one in got],
        **_cost(reading, [second for one in got for second in one.seconds]),
    }


def _likelihood(
    subject: Subject, continuation: str, reading: Reading, reference: Reference, *, dense: bool
) -> dict[str, Any]:
    target = subject.ids(continuation, first=False)[0, :SCORED]
    if len(target) < SCORED:
        raise InputError(f"The continuation holds {len(target)} tokens, and {SCORED} are to be scored.")
    logprobs, seconds = reading.follow(target)
    nll = -logprobs.gather(1, target[:, None])[:, 0]
    told: dict[str, Any] = {
        "nll": [round(value, 5) for value in nll.tolist()],
        "perplexity": float(nll.double().mean().exp()),
        **_cost(reading, seconds),
    }
    if dense:
        reference.logprobs = logprobs
    if reference.logprobs is not None:
        told |= _beside(logprobs, reference.logprobs)
    return told


def _beside(logprobs: Tensor, dense: Tensor) -> dict[str, Any]:
    """KL(dense | method) at every token, and the first token that would be another."""
    kl = (dense.exp() * (dense - logprobs)).sum(-1).clamp_min(0)
    other = (logprobs.argmax(-1) != dense.argmax(-1)).nonzero()
    return {
        "kl": [round(value, 6) for value in kl.tolist()],
        "first_divergence": int(other[0]) if len(other) else None,
        "same_top_1": float(torch.eq(logprobs.argmax(-1), dense.argmax(-1)).float().mean()),
    }


def _cost(reading: Reading, seconds: list[float]) -> dict[str, Any]:
    layers = reading.last.report().layers
    return {
        "document_tokens": reading.ids.shape[1],
        "prefill_seconds": round(reading.seconds, 4),
        "ms_per_token": round(1000 * median(seconds), 3) if seconds else None,
        "nbytes": reading.nbytes,
        "tokens_held": max(layer.tokens_held for layer in layers),
        "tokens_read": max(layer.tokens_read for layer in layers),
    }
