"""The work of one token by a model's config: weights to read, layers, heads. No weights are needed."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

from kvote.errors import InputError, UnsupportedModelError
from kvote.hf.model import is_full_attention
from kvote.measure.config import reason
from kvote.measure.geometry import Geometry
from kvote.measure.trial import Trial, attention_calls

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k")


_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)


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
    # Positions are looked up in a table of that many, and no text is longer.
    learned: bool = False

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights that a step reads."""
        return self.geometry.dtype.itemsize * sum(m.rows * m.columns * m.count for m in self.matrices)


def shape(config: Any, batch: int = 1) -> Shape:
    """The shape that ``config`` describes. Raises InputError or UnsupportedModelError for models that kvote cannot
    manage."""
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False):
        made = type(config).__name__
        raise UnsupportedModelError(f"{made} makes encoder-decoder models; kvote manages decoder-only ones.")
    dtype, notes = _dtype(config, text)
    model = _model(config, text)
    name, native = type(model).__name__, model.config.get_text_config(decoder=True)._attn_implementation
    layers = _layers(model, text)
    full = [index for index, layer in enumerate(layers) if is_full_attention(layer)]
    if not full:
        raise UnsupportedModelError(
            f"None of the {len(layers)} layers of {name} caches every token of the text in full attention, so there is "
            "nothing for kvote to manage."
        )
    trial = attention_calls(model)
    geometry = _geometry(name, trial, full, dtype)
    trained = getattr(text, "max_position_embeddings", None)
    decoder = model.get_decoder()
    return Shape(
        name=name,
        geometry=geometry,
        full=len(full),
        others=len(layers) - len(full),
        window=_window(text),
        rotary=any(hasattr(module, "rotary_emb") for module in decoder.modules()),
        matrices=_matrices((decoder, model.get_output_embeddings()), text, batch),
        resident_bytes=dtype.itemsize * sum(p.numel() for p in model.parameters()),
        trained=trained if isinstance(trained, int) else None,
        learned=_learned(decoder, trained),
        notes=(*notes, *_notes(native, trial, config, text)),
    )


def _model(config: Any, text: Any) -> Any:
    """A model that reads text, of shapes and no weights. Raises InputError where ``config`` makes none."""
    known = [(AutoModelForCausalLM, text), (AutoModelForImageTextToText, config)]
    makers = [(auto, own) for auto, own in known if type(own) in auto._model_mapping]
    if not makers:
        raise InputError(f"transformers has no decoder-only model of text for a {type(config).__name__}.")
    auto, own = makers[0]
    try:
        with torch.device("meta"):
            # The dtype is that of pure shapes; some experts are computed in no other.
            return auto.from_config(own, dtype=torch.bfloat16, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"Cannot make a model of this {type(own).__name__}: {reason(error)}") from error


def _layers(model: Any, config: Any) -> list[Any]:
    """The cache layers that transformers makes. Those of models without attention are none of its attention's."""
    if model._is_stateful and not getattr(config, "num_attention_heads", None):
        raise UnsupportedModelError(f"{type(model).__name__} has no attention; there is nothing for kvote to manage.")
    return list(DynamicCache(config=config).layers)


def _geometry(name: str, trial: Trial, full: list[int], dtype: torch.dtype) -> Geometry:
    """Heads and channels of the full-attention layers, as they reached attention in a trial."""
    calls = [call for call in trial.calls if call.layer is None or call.layer in full]
    # Where a trial ended before the first of them, other layers stand for it.
    calls = calls or (trial.calls if trial.ended is not None else [])
    if not calls and trial.ended is not None:
        raise UnsupportedModelError(
            f"What attention {name} has cannot be found out without weights ({reason(trial.ended)}); measure on the "
            "model itself."
        )
    if not calls:
        raise UnsupportedModelError(f"{name} does not route attention through transformers' AttentionInterface.")
    # Whoever passes a number on for every layer, passes it once for each.
    if any(count > 1 for layer, count in Counter(call.layer for call in calls).items() if layer is not None):
        raise UnsupportedModelError(f"Layers of {name} attend more than once to what they cache; no prediction for it.")
    shapes = {(call.heads, call.kv_heads, call.dim, call.value_dim) for call in calls}
    if len(shapes) > 1:
        raise UnsupportedModelError(f"Full-attention layers of {name} differ in heads or channels; no prediction.")
    ((heads, kv_heads, dim, value_dim),) = shapes
    if dim != value_dim:
        raise UnsupportedModelError(
            f"{name} caches keys of {dim} channels and values of {value_dim}, or latents of both; no prediction for it."
        )
    if not all(call.causal for call in calls):
        raise UnsupportedModelError(f"Queries of {name} see what follows them; kvote manages causal attention.")
    if heads % kv_heads:
        raise InputError(
            f"{heads} query heads of {name} cannot share {kv_heads} key heads evenly; is the config right?"
        )
    if dim % 2:
        raise UnsupportedModelError(f"Heads of {name} have {dim} channels, an odd number; no prediction for it.")
    return Geometry(heads, kv_heads, dim, dtype)


def _learned(decoder: nn.Module, trained: Any) -> bool:
    """Whether a table of embeddings is one of positions: some have a few rows more."""
    tables = [module for module in decoder.modules() if isinstance(module, nn.Embedding)]
    return isinstance(trained, int) and any(trained <= table.num_embeddings <= trained + 2 for table in tables[1:])


def _dtype(config: Any, text: Any) -> tuple[torch.dtype, tuple[str, ...]]:
    """In which weights and cache are counted and measured."""
    found = [each.dtype for each in (text, config) if isinstance(each.dtype, torch.dtype)]
    if not found or found[0] in _COMPUTED:
        return (found or [torch.bfloat16])[0], ()
    return torch.bfloat16, (f"The config's {found[0]} is not computed with here; all is counted as bfloat16.",)


def _window(config: Any) -> int | None:
    """Tokens that other layers see, of a sliding window or a chunk; None for a state."""
    found = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return next((window for window in found if isinstance(window, int) and window > 0), None)


def _matrices(parts: Iterable[nn.Module | None], config: Any, batch: int) -> tuple[Matrix, ...]:
    """All weights of two and more axes but embeddings, of which a token reads one row."""
    found: Counter[tuple[int, int]] = Counter()
    experts, active = _first(config, _EXPERTS), _first(config, _ACTIVE)
    # Sequences of a batch choose their experts apart.
    met = experts * (1 - (1 - active / experts) ** batch) if experts and active else 0.0
    modules = {module: path for part in parts if part is not None for path, module in part.named_modules()}
    for module, path in modules.items():
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


def _notes(native: str, trial: Trial, config: Any, text: Any) -> tuple[str, ...]:
    notes = []
    if getattr(config, "quantization_config", None) or getattr(text, "quantization_config", None):
        notes.append("The config names a quantisation; weights are counted as if they were not quantised.")
    if native != "sdpa":
        notes.append(f"transformers runs this model with {native} attention; its default is measured with sdpa here.")
    if trial.ended is not None:
        notes.append("Its attention was found out in the first layers alone: without weights it runs no further.")
    return tuple(notes)


def _first(config: Any, names: tuple[str, ...]) -> int:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), 0)
