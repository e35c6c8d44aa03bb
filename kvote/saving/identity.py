"""Whose file it is: what tells one model, with these very weights, and one tokenizer from all others."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from kvote.calibration.fingerprint import Fingerprint

# Numbers side by side whose sums are taken, so that weights that change places are noticed.
_COLUMNS = 1024


def of_model(model: Any) -> dict[str, Any]:
    """The identity of a model: class, dtype, fingerprint, and a digest of all its weights."""
    print_of = asdict(Fingerprint.of(model))
    return {
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": {**print_of, "sample": list(print_of["sample"]), "rope": dict(print_of["rope"])},
        "weights": of_weights(model),
    }


def of_weights(model: torch.nn.Module) -> str:
    """SHA-256 of names, forms and checksums of all weights: each number that changes changes it."""
    digest = hashlib.sha256()
    for name, weight in sorted((*model.named_parameters(), *model.named_buffers()), key=lambda pair: pair[0]):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        if weight.device.type != "meta":
            digest.update(_sums(weight.detach()).numpy().tobytes())
    return digest.hexdigest()


def _sums(weight: Tensor) -> Tensor:
    """Sums int64 of the bits of weights, of every 1024th together."""
    flat = weight.contiguous().flatten()
    words = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(flat.element_size(), torch.int64))
    whole = len(words) // _COLUMNS * _COLUMNS
    sums = words[:whole].view(-1, _COLUMNS).sum(0, dtype=torch.int64)
    rest = words[whole:].long()
    sums[: len(rest)] += rest
    return sums.cpu()


def of_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of all that decides which tokens a text becomes, padding and truncation apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        told = json.loads(backend.to_str())
        told.pop("padding", None)
        told.pop("truncation", None)
    else:
        # Of a tokenizer that is not transformers', only its class is known.
        told = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else None
    special = getattr(tokenizer, "special_tokens_map", {})
    more = [type(tokenizer).__name__, {name: str(token) for name, token in special.items()}]
    text = json.dumps([told, more, getattr(tokenizer, "chat_template", None)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def of_ids(ids: Tensor) -> str:
    """SHA-256 of token ids, int64."""
    return hashlib.sha256(ids.detach().cpu().to(torch.int64).contiguous().numpy().tobytes()).hexdigest()
