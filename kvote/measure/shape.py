"""What a model's config says about the work of one token: weights to read, layers, heads. No weights are needed."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kvote.errors import InputError, UnsupportedModelError
from kvote.hf.model import is_full_attention, native_layers
from kvote.measure.geometry import Geometry

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")


@dataclass(frozen=True)
class Matrix:
    """A weight [rows, columns] and how many like it a token meets (of a mixture's experts, those that are active)."""

    rows: int
    columns: int
    count: float


@dataclass(frozen=True)
class Shape:
    """``full`` layers attend to everything and are kvote's to manage; ``others`` see at most ``window`` tokens, or a
    state (None). ``resident_bytes`` are those of all weights, ``notes`` what a prediction does not know about."""

    name: str
    geometry: Geometry
    full: int
    others: int
    window: int | None
    rotary: bool
    matrices: tuple[Matrix, ...]
    resident_bytes: int
    trained: int | None
    notes: tuple[str, ...]

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights that a step reads."""
        return self.geometry.dtype.itemsize * sum(m.rows * m.columns * m.count for m in self.matrices)


def load_config(name: str) -> Any:
    """The text config that a hub name, a folder or a file holds. Raises InputError where there is none."""
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or name.endswith(".json")):
        raise InputError(f"There is no config at {name}.")
    try:
        config = AutoConfig.from_pretrained(str(path) if path.exists() else name, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"Cannot read a config from {name!r}: {_first_line(error)}") from error
    return config


def shape(config: Any, batch: int = 1) -> Shape:
    """What ``config`` says. Raises InputError or UnsupportedModelError for models that kvote cannot manage."""
    config = config.get_text_config(decoder=True)
    try:
        # On the meta device a model has shapes and no weights.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"Cannot make a model of this {type(config).__name__}: {_first_line(error)}") from error
    layers = native_layers(model)
    if getattr(config, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{type(model).__name__} caches latents, not keys and values; no prediction for it."
        )
    full = sum(is_full_attention(layer) for layer in layers)
    heads = config.num_attention_heads
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    geometry = Geometry(
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype,
    )
    trained = getattr(config, "max_position_embeddings", None)
    return Shape(
        name=type(model).__name__,
        geometry=geometry,
        full=full,
        others=len(layers) - full,
        window=getattr(config, "sliding_window", None),
        rotary=any(hasattr(module, "rotary_emb") for module in model.modules()),
        matrices=_matrices(model, config, batch),
        resident_bytes=dtype.itemsize * sum(p.numel() for p in model.parameters()),
        trained=trained if isinstance(trained, int) else None,
        notes=_notes(model, config),
    )


def _matrices(model: nn.Module, config: Any, batch: int) -> tuple[Matrix, ...]:
    """All weights of two and more axes but embeddings, of which a token reads one row."""
    found: Counter[tuple[int, int]] = Counter()
    experts, active = _first(config, _EXPERTS), _first(config, _ACTIVE)
    # Sequences of a batch choose their experts apart.
    met = experts * (1 - (1 - active / experts) ** batch) if experts and active else 0.0
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for weight in module.parameters(recurse=False):
            *stacked, rows, columns = (1, 1, *weight.shape)[-max(2, weight.dim()) :]
            share = float(torch.Size(stacked).numel())
            if experts and "experts" in path.split(".") and "shared" not in path:
                share *= met / experts
            if weight.dim() > 1:
                found[rows, columns] += share  # type: ignore[assignment]
    return tuple(Matrix(rows, columns, count) for (rows, columns), count in sorted(found.items()))


def _notes(model: Any, config: Any) -> tuple[str, ...]:
    notes = []
    if getattr(config, "quantization_config", None):
        notes.append("The config names a quantisation; weights are counted as if they were not quantised.")
    native = model.config._attn_implementation
    if native != "sdpa":
        notes.append(f"transformers runs this model with {native} attention; its default is measured with sdpa here.")
    return tuple(notes)


def _first(config: Any, names: tuple[str, ...]) -> int:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), 0)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
