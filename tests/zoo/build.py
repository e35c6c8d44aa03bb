"""Builds the smallest model of a class from its default config, without a table of configs."""

import copy
import dataclasses
import re
import warnings
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from zoo.sizes import ALONE, BERT_LIKE, INSTEAD, SIZES, VALID, VOCABULARY

_TEXT = ("text_config", "llm_config", "decoder", "language_config", "thinker_config")
# What says how many layers of which kind there are.
_DEPTH = (
    "num_hidden_layers",
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "num_kv_shared_layers",
    "full_attn_idxs",
)
_FULL = ("full_attention", "attention", "global", "hybrid")


def causal_classes() -> list[str]:
    """Every class of transformers' causal-LM mapping."""
    return sorted(set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()))


def image_text_classes() -> list[str]:
    """Every class of transformers' image-text-to-text mapping that is in no other."""
    names = set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    return sorted(names - set(causal_classes()))


def build(name: str, *, layers: list[int] | None = None, seed: int = 1, **changes: Any) -> PreTrainedModel:
    """The smallest model of class ``name``: random, in evaluation mode, float32, generates to the length asked for.

    ``layers``: which layers of its default config it has; one of each kind if None. ``changes`` are set in the text
    config. Raises whatever the class raises where it cannot be built.
    """
    model_class = getattr(transformers, name)
    config = shrunk(model_class.config_class, name, layers, changes)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            parameters = sum(p.numel() for p in model_class._from_config(copy.deepcopy(config)).parameters())
        if parameters > 150e6:
            raise ValueError(f"{name} has {parameters:,} parameters after shrinking")
        model = model_class._from_config(config, dtype=torch.float32)
    return loud(model, seed).eval()


def shrunk(kind: type[PretrainedConfig], name: str, layers: list[int] | None, changes: dict[str, Any]) -> Any:
    """A config of ``kind``, every size at most that in ``SIZES``, one layer of each kind or ``layers``."""
    default = kind(**VALID.get(name, {}))
    own = dict(INSTEAD.get(name, {}))
    if name in BERT_LIKE:
        own["is_decoder"] = True
    if layers is not None:
        own = {field: value for field, value in own.items() if field not in _DEPTH}
        own |= ALONE.get(name, {})
    inner = _parts(default)
    text = next((field for field in _TEXT if field in inner), None)
    parts = {field: own.pop(field) for field in list(own) if field in inner}
    top = own.pop("self", {})
    own |= changes
    if text is None:
        values = _fields(default, layers, {**own, **top})
    else:
        values = _fields(default, None, top)
        parts[text] = own
    for field, value in inner.items():
        values[field] = _part(value, layers if field == text else None, parts.get(field, {}), decoder=field == text)
    return kind(**values)


def _part(default: PretrainedConfig, layers: list[int] | None, own: dict[str, Any], *, decoder: bool = False) -> Any:
    values = _fields(default, layers, own, decoder=decoder)
    for field, value in _parts(default).items():
        values[field] = _part(value, None, {})
    return type(default)(**values)


def _parts(default: PretrainedConfig) -> dict[str, PretrainedConfig]:
    return {
        field: value
        for field, value in vars(default).items()
        if isinstance(value, PretrainedConfig) and field[0] != "_"
    }


def kinds_of_layers(default: PretrainedConfig) -> list[int]:
    """The first layer of each kind, told apart by every list that has one entry per layer; at least two layers."""

    def _tells(each: list[Any]) -> bool:
        return len(set(map(str, each))) < len(each) or not all(isinstance(value, int) for value in each)

    depth = _depth(default)
    lists = {name: each for name, each in _per_layer(default).items() if _tells(each)}
    seen: dict[Any, int] = {}
    for index in range(depth):
        seen.setdefault(tuple(str(each[index]) for each in lists.values()), index)
    chosen = sorted(seen.values())[:4]
    for index in range(depth):
        if len(chosen) < 2 and index not in chosen:
            chosen.append(index)
    return sorted(chosen)


def _value(config: PretrainedConfig, name: str) -> Any:
    """A field's value; a config may keep it under another name."""
    return vars(config).get(name, vars(config).get(config.attribute_map.get(name, name)))


def _depth(config: PretrainedConfig) -> int:
    try:
        return int(config.num_hidden_layers)
    except (AttributeError, TypeError):
        return 2


def _per_layer(config: PretrainedConfig) -> dict[str, list[Any]]:
    depth = _depth(config)
    return {
        name: list(value)
        for name, value in ((each.name, _value(config, each.name)) for each in dataclasses.fields(config))
        if isinstance(value, list | tuple) and len(value) == depth and depth > 3
    }


def _fields(
    default: PretrainedConfig, layers: list[int] | None, own: dict[str, Any], *, decoder: bool = True
) -> dict[str, Any]:
    """What the config's constructor is given."""
    names = {each.name for each in dataclasses.fields(default)}
    per_layer = _per_layer(default)
    chosen = kinds_of_layers(default) if layers is None else layers
    values: dict[str, Any] = {}
    for name in sorted(names):
        value = _value(default, name)
        if isinstance(value, PretrainedConfig):
            continue
        if name in per_layer:
            values[name] = [_shrunk_value(name, per_layer[name][index]) for index in chosen]
        else:
            values[name] = _shrunk_value(name, value)
    depth = default.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if depth in names and isinstance(values.get(depth), int):
        values[depth] = len(chosen)
    if decoder and isinstance(values.get("decoder_layers"), int):
        values["decoder_layers"] = len(chosen)
    if decoder and "sliding_window" in values and "layer_types" not in per_layer and "sliding_window" not in own:
        values["sliding_window"] = None
    for name, special in (("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)):
        if name in values:
            values[name] = special
    if "kv_lora_rank" in values and isinstance(values.get("num_attention_heads"), int):
        # Latents are expanded to a key per query head.
        values["num_key_value_heads"] = values["num_attention_heads"]
        if "head_dim" in values:
            values["head_dim"] = values["qk_rope_head_dim"]
    values |= own
    types = values.get("layer_types")
    if types and not any(kind in _FULL for kind in types) and "sliding_attention" in types:
        types[-1] = "full_attention"
    return {name: value for name, value in values.items() if name in names or name in own}


def _shrunk_value(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return _shrunk_rope(value) if name == "rope_parameters" else copy.deepcopy(value)
    for pattern, most in SIZES:
        if re.fullmatch(pattern, name):
            return min(value, most)
    if name.endswith(("token_id", "token_index")):
        return min(value, VOCABULARY - 1)
    return value


def _shrunk_rope(value: Any) -> Any:
    """Sections of M-RoPE add up to half of what is rotated of a head of 16 channels."""
    if not isinstance(value, dict):
        return copy.deepcopy(value)
    inner = {name: _shrunk_rope(each) for name, each in value.items()}
    if isinstance(inner.get("mrope_section"), list | tuple) and len(inner["mrope_section"]) == 3:
        half = int(16 * inner.get("partial_rotary_factor", 1.0)) // 2
        inner["mrope_section"] = [half - 2 * (half // 4), half // 4, half // 4]
    return inner


def loud(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights so large that attention is peaked and greedy tokens vary; norms and biases away from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor, size: float) -> torch.Tensor:
        return (torch.randn(like.shape, generator=generator) * size).to(like.dtype)

    head = getattr(model.get_output_embeddings(), "weight", None)
    done: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            own = dict(module.named_parameters(recurse=False))
            for name, weight in own.items():
                if weight.numel() == 0 or not weight.is_floating_point() or id(weight) in done:
                    continue
                done.add(id(weight))
                if isinstance(module, nn.Embedding):
                    # Where the embedding is the head too, a token would answer with itself.
                    weight.copy_(noise(weight, 0.03 if weight is head else 1.0))
                elif weight is head:
                    weight.copy_(noise(weight, 0.2))
                elif isinstance(module, nn.Linear) and name == "weight":
                    weight.copy_(noise(weight, 1.5 / weight.shape[1] ** 0.5))
                elif isinstance(module, Conv1D) and name == "weight":
                    weight.copy_(noise(weight, 1.5 / weight.shape[0] ** 0.5))
                elif weight.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd):
                    weight.copy_(noise(weight, 1.5 / max(weight.shape[1:]) ** 0.5))
                elif weight.dim() == 1 and "norm" in type(module).__name__.lower() and name == "weight":
                    weight.add_(noise(weight, 0.3))
                elif isinstance(module, nn.Linear | Conv1D | nn.LayerNorm) and name == "bias":
                    weight.add_(noise(weight, 0.2))
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        settings.eos_token_id = settings.forced_eos_token_id = settings.forced_bos_token_id = None
        settings.pad_token_id = 0
        settings.bos_token_id = settings.decoder_start_token_id = 1
    return model


def full_layers(name: str) -> list[int]:
    """The layers of the default config, one of each kind, that attend to everything; none if no layer does."""
    default = getattr(transformers, name).config_class(**VALID.get(name, {}))
    text = default.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None)
    kinds = kinds_of_layers(text)
    if not types or name in ALONE:
        return kinds[:1]
    full = [index for index in kinds if index < len(types) and types[index] in _FULL]
    return full or ([kinds[0]] if "sliding_attention" in types else [])
