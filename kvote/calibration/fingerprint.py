"""Fingerprint: which model a calibration belongs to."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

# Weights that are looked at: so many matrices, evenly spaced over the model, and so many numbers of each.
_MATRICES, _NUMBERS = 16, 256


@dataclass(frozen=True)
class Fingerprint:
    """Shape of a model's attention, and a checksum over some of its weights.

    The checksum is taken of the weights in bfloat16, so that a model may be loaded in other precisions than the one
    it was calibrated in. A fine-tuned model is another model.
    """

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    checksum: str

    @classmethod
    def of(cls, model: Any) -> "Fingerprint":
        """That of a ``PreTrainedModel``."""
        config = model.config.get_text_config(decoder=True)
        heads = int(config.num_attention_heads)
        return cls(
            model_type=str(config.model_type),
            layers=int(config.num_hidden_layers),
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            checksum=_checksum(model),
        )


def _checksum(model: Any) -> str:
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    digest = hashlib.sha256()
    for i in range(min(_MATRICES, len(matrices))):
        weight = matrices[i * len(matrices) // min(_MATRICES, len(matrices))].detach()
        part = weight.flatten()[:: max(1, weight.numel() // _NUMBERS)][:_NUMBERS]
        # Quantised weights are whole numbers and are taken as they are.
        part = part.to(torch.bfloat16).view(torch.int16) if part.is_floating_point() else part
        digest.update(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
