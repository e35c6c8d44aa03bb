"""The model that is measured, and what identifies it."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvote.eval.template import Template

_SAMPLED = 4096


@dataclass(frozen=True)
class Subject:
    """A model ready to be measured, and how documents and questions are put to it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: Template
    embedded: bool = False
    stops: frozenset[int] = field(default_factory=frozenset)

    def ids(self, text: str, *, first: bool) -> Tensor:
        """Tokens [1, n] of ``text``; special ones come with the ``first`` text, where no chat template has them."""
        special = first and not self.template.chat
        ids: list[int] = self.tokenizer(text, add_special_tokens=special).input_ids
        # Some tokenizers end every text; in the middle of one that would stop the model.
        while special and ids and ids[-1] in self.stops:
            ids.pop()
        return torch.tensor([ids], dtype=torch.long, device=self.model.device)

    def count(self, text: str) -> int:
        """Tokens of ``text`` by itself."""
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)


def model_digest(model: PreTrainedModel) -> str:
    """SHA-256 of numbers spread over every parameter, its name and its shape."""
    seen = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLED)].float().cpu().contiguous()
        seen.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        seen.update(some.numpy().tobytes())
    return seen.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary and the chat template."""
    words = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr((words, getattr(tokenizer, "chat_template", None))).encode()).hexdigest()
