"""Scope: prefixes are shared among prompts that the same model reads with the same method in the same way."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kvote.method import Method
from kvote.saving import identity, recipe


@dataclass(frozen=True)
class Reading:
    """How a prompt is read: in passes of ``tokens_per_pass``, and whether a question follows it. ``tokenizer`` is that
    of a method that reads a prompt again, behind words of its own."""

    tokens_per_pass: int
    question_follows: bool
    tokenizer: Any = None


def scope_of(
    model: PreTrainedModel, method: Method, reading: Reading, known: dict[str, Any] | None = None
) -> str | None:
    """SHA-256 of all that decides what a cache holds of given tokens; None for a method that cannot be told apart from
    another one of its name.

    All weights are looked at, so that a model that has been trained meanwhile is another model, unless its identity is
    ``known``.
    """
    how = recipe.describe(method)
    if "build" not in how:
        return None
    words = None
    if method.keep.needs.repeat_chunk and reading.tokenizer is not None:
        words = identity.of_tokenizer(reading.tokenizer)
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    told = [
        identity.of_model(model) if known is None else known,
        config,
        _adapters(model),
        how,
        reading.tokens_per_pass,
        reading.question_follows,
        words,
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _adapters(model: nn.Module) -> list[Any]:
    """Which adapters of PEFT are at work, and how strongly: no weight tells."""
    return [
        [name, *(str(getattr(part, told, None)) for told in ("active_adapters", "disable_adapters", "scaling"))]
        for name, part in model.named_modules()
        if hasattr(part, "active_adapters") and hasattr(part, "disable_adapters")
    ]
